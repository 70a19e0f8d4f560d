/* linear_tile.cu -- one matrix times many rows. */
#include "kernels/cuda/tile.cuh"

namespace
{

/* Tiles that run together share weights and rows of x in L2: up to `wide` tiles of outputs, for all rows, then the next ones. */
template <class S, bool INT8, bool GROUPS>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    linear_kernel(const de_cu_linear w, const bf16 *x, size_t ldx, uint32_t rows, uint32_t wide,
                  de_cu_store store, void *y, size_t ldy)
{
    if constexpr (tile_is_here<S, GROUPS>()) {
        extern __shared__ __align__(1024) char shared[];
        const uint32_t across = (w.out + S::BM - 1) / S::BM, down = (rows + S::BN - 1) / S::BN,
                       first = blockIdx.x / (wide * down) * wide, n = min(wide, across - first),
                       at = blockIdx.x % (wide * down);
        const uint32_t tile0 = (first + at % n) * (S::BM / 16), row0 = at / n * S::BN;
        const float *out = tile_product<S, INT8, GROUPS>(
            w, tile0,
            [&](uint32_t i) { return row0 + i < rows ? x + (size_t)(row0 + i) * ldx : NULL; },
            shared);
        const bool whole = ldy % 4 == 0; /* rows begin where four values may be written at once */
        for (uint32_t i = threadIdx.x * 4; i < S::BN * S::BM; i += S::THREADS * 4) {
            const uint32_t r = row0 + i / S::BM, o = tile0 * 16 + i % S::BM;
            if (r >= rows || o >= w.out)
                continue;
            const float4 v =
                tile_get < INT8 && !GROUPS > (out + i / S::BM * S::LD + i % S::BM, w, o);
            const size_t to = r * ldy + o;
            if (whole && o + 4 <= w.out) {
                if (store == DE_CU_BF16) {
                    *(uint2 *)((bf16 *)y + to) = make_uint2(cu_pack(v.x, v.y), cu_pack(v.z, v.w));
                } else {
                    float4 *p = (float4 *)((float *)y + to);
                    const float4 s = store == DE_CU_ADD ? *p : make_float4(0, 0, 0, 0);
                    *p = store == DE_CU_ADD
                             ? make_float4(s.x + v.x, s.y + v.y, s.z + v.z, s.w + v.w)
                             : v;
                }
                continue;
            }
            const float e[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (o + j >= w.out)
                    break;
                else if (store == DE_CU_BF16)
                    ((bf16 *)y)[to + j] = __float2bfloat16(e[j]);
                else if (store == DE_CU_F32)
                    ((float *)y)[to + j] = e[j];
                else
                    ((float *)y)[to + j] += e[j];
        }
    }
}

} // namespace

void de_cu_linear_tile(cudaStream_t stream, const de_cu_linear &w, const bf16 *x, size_t ldx,
                       uint32_t rows, de_cu_store store, void *y, size_t ldy)
{
    choose_tile(w, tile_for(w.out, rows), [&](auto shape, auto int8, auto groups) {
        typedef decltype(shape) S;
        constexpr bool INT8 = decltype(int8)::value, GROUPS = decltype(groups)::value;
        const uint32_t across = (w.out + S::BM - 1) / S::BM, down = (rows + S::BN - 1) / S::BN,
                       parts = (across + 15) / 16, wide = (across + parts - 1) / parts;
        cu_launch_threads(linear_kernel<S, INT8, GROUPS>, dim3(across * down), S::THREADS,
                          S::template shared_bytes<INT8>(), stream, false, w, x, ldx, rows, wide,
                          store, y, ldy);
    });
}
