/* attn.cuh -- how keys and values lie in a page, and what both attention kernels do to a row's query and key.
 *
 * A page of a KV head: K [64 tokens][256 dims], then V transposed [256 dims][64 tokens], so that both products of attention find
 * their summed index contiguous: a lane loads 16 bytes (8 BF16 or 16 e4m3) along it. Pages of all heads of a layer lie together:
 * [kv_heads][K, V].
 *
 * With BF16 pages products are BF16, with e4m3 ones FP16, which holds e4m3 exactly and the rounded query and probabilities with
 * three bits more. */
#ifndef DE_KERNELS_CUDA_ATTN_CUH
#define DE_KERNELS_CUDA_ATTN_CUH

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/decode.cuh"

namespace
{

enum { A_D = DE_CU_ATTN, A_P = DE_CU_PAGE };

/* FP8: pages of e4m3; else BF16. */
template <bool FP8> struct kv_format {
    static constexpr int SIZE = FP8 ? 1 : 2,
                         LANE = 16 / SIZE; /* bytes of one value; values of 16 bytes */
    static __device__ __forceinline__ uint32_t pair(float lo, float hi) /* of the products' type */
    {
        if (!FP8)
            return cu_pack(lo, hi);
        const __half2 v = __floats2half2_rn(lo, hi);
        return *(const uint32_t *)&v;
    }
    static __device__ __forceinline__ uint16_t one(float v)
    {
        return (uint16_t)pair(v, 0);
    }
    static __device__ __forceinline__ void mma(float d[4], const uint32_t a[4], uint32_t b0,
                                               uint32_t b1)
    {
        if (!FP8) {
            cu_mma(d, a, b0, b1);
            return;
        }
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    /* 16 bytes as pairs of the products' type: LANE / 2 of them. */
    static __device__ __forceinline__ void widen(const uint4 &v, uint32_t *to)
    {
        const uint32_t w[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (FP8) {
                const __half2_raw lo = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)w[i],
                                                                  __NV_E4M3),
                                  hi = __nv_cvt_fp8x2_to_halfraw2(
                                      (__nv_fp8x2_storage_t)(w[i] >> 16), __NV_E4M3);
                to[2 * i] = *(const uint32_t *)&lo;
                to[2 * i + 1] = *(const uint32_t *)&hi;
            } else {
                to[i] = w[i];
            }
        }
    }
    /* What is not finite becomes 0: its own row shows it anyway, a later owner of the page must not. */
    static __device__ __forceinline__ void store(uint8_t *to, size_t i, float v)
    {
        v = isfinite(v) ? v : 0;
        if (FP8)
            to[i] = (uint8_t)__nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
        else
            ((bf16 *)to)[i] = __float2bfloat16(v);
    }
};

/* One head of a row, by a warp: x [256] BF16 -> norm with 1 + w, rotary, times `factor`; lane's values are dims lane + 32 i. `swap`:
 * 256 floats of shared memory of this warp. */
__device__ __forceinline__ void head_values(const bf16 *x, const float *w, float eps,
                                            const float *rope, uint32_t rotary, float factor,
                                            float *swap, float v[8])
{
    const uint32_t lane = threadIdx.x % 32, half = rotary / 2;
    float s = 0, g[8], c[8] = {}, sn[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t d = i * 32 + lane;
        v[i] = __bfloat162float(x[d]);
        g[i] = 1 + w[d];
        if (d < rotary) {
            c[i] = rope[d < half ? d : d - half];
            sn[i] = d < half ? -rope[half + d] : rope[d];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        s = fmaf(v[i], v[i], s);
    s = rsqrtf(cu_sum(s) / A_D + eps);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] *= s * g[i];
        swap[i * 32 + lane] = v[i];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t d = i * 32 + lane;
        if (d < rotary) /* with the other of its pair */
            v[i] = fmaf(v[i], c[i], swap[d < half ? d + half : d - half] * sn[i]);
        v[i] *= factor;
    }
}

/* Key and value of a row into their page, by a warp. p: the row's projections. */
template <bool FP8>
__device__ __forceinline__ void put_kv(const de_cu_attn &a, const bf16 *p, const float *rope,
                                       uint32_t head, uint32_t page, uint32_t at, float *swap)
{
    const uint32_t lane = threadIdx.x % 32;
    const bf16 *k = p + (size_t)a.q_heads * 2 * A_D + head * A_D, *v = k + (size_t)a.kv_heads * A_D;
    uint8_t *to = a.kv + page * a.page_bytes + (size_t)head * 2 * A_P * A_D * kv_format<FP8>::SIZE;
    float x[8];
    head_values(k, a.k_norm, a.eps, rope, a.rotary, 1, swap, x);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        kv_format<FP8>::store(to, (size_t)at * A_D + i * 32 + lane, x[i]);
        kv_format<FP8>::store(to, (size_t)A_P * A_D + (size_t)(i * 32 + lane) * A_P + at,
                              __bfloat162float(v[i * 32 + lane]));
    }
}

} // namespace

#endif
