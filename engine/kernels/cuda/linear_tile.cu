/* linear_tile.cu -- one matrix times many rows. */
#include "kernels/cuda/tile.cuh"

namespace
{

template <class S, bool INT8, bool GROUPS>
__global__ void __launch_bounds__(T_THREADS, 1)
    linear_kernel(const de_cu_linear w, const bf16 *x, size_t ldx, uint32_t rows, de_cu_store store,
                  void *y, size_t ldy)
{
    extern __shared__ __align__(128) char shared[];
    /* blocks that run together share rows of x more than weights: outputs are the fast index */
    const uint32_t tile0 = blockIdx.x * (S::BM / 16), row0 = blockIdx.y * S::BN;
    const float *out = tile_product<S, INT8, GROUPS>(
        w, tile0, [&](uint32_t i) { return row0 + i < rows ? x + (size_t)(row0 + i) * ldx : NULL; },
        shared);
    for (uint32_t i = threadIdx.x; i < S::BN * S::BM; i += T_THREADS) {
        const uint32_t r = row0 + i / S::BM, o = tile0 * 16 + i % S::BM;
        if (r >= rows || o >= w.out)
            continue;
        float v = out[i / S::BM * S::LD + i % S::BM];
        if (INT8 && !GROUPS)
            v *= w.scale[o];
        if (store == DE_CU_BF16)
            ((bf16 *)y)[r * ldy + o] = __float2bfloat16(v);
        else if (store == DE_CU_F32)
            ((float *)y)[r * ldy + o] = v;
        else
            ((float *)y)[r * ldy + o] += v;
    }
}

} // namespace

void de_cu_linear_tile(cudaStream_t stream, const de_cu_linear &w, const bf16 *x, size_t ldx,
                       uint32_t rows, de_cu_store store, void *y, size_t ldy)
{
    choose_tile(w, rows > 96 && w.out >= 256, [&](auto shape, auto int8, auto groups) {
        typedef decltype(shape) S;
        constexpr bool INT8 = decltype(int8)::value, GROUPS = decltype(groups)::value;
        const dim3 grid((w.out + S::BM - 1) / S::BM, (rows + S::BN - 1) / S::BN);
        cu_launch_threads(linear_kernel<S, INT8, GROUPS>, grid, T_THREADS,
                          S::template shared_bytes<INT8>(), stream, false, w, x, ldx, rows, store,
                          y, ldy);
    });
}
