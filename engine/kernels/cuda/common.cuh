/* common.cuh -- what the CUDA kernels share: types, the matrix instruction, copies, sums.
 *
 * Weights lie as fragments of mma.m16n8k16, so that a lane loads 16 bytes and has what the tensor core wants, from global or from
 * shared memory, and wgmma takes the same registers as its A operand. A tile is 16 outputs (rows) x 32 inputs (k):
 *
 *   lane l, g = l / 4, t = l % 4;  its eight k: 2t, 2t+1, 2t+8, 2t+9, 2t+16, 2t+17, 2t+24, 2t+25
 *   BF16, 1,024 bytes   16 bytes at 16 l: row g, those k in order;  16 bytes at 512 + 16 l: row g + 8
 *   INT8, 512 bytes     16 bytes at 16 l: row g in bytes 0-7, row g + 8 in bytes 8-15; in each word of four the k stand in the
 *                       order 0, 2, 1, 3 of the list, which widens to BF16 pairs with masks alone (widen())
 *
 * Tiles of 16 rows follow one another along k: tile (r, c) is number r * (in / 32) + c. Rows are padded to 16 with zeros; `in` is a
 * multiple of 32. The sum of an output is one chain of mma steps in rising k (per scale group where there are several).
 *
 * Products of BF16 are exact in the tensor core, sums are float. INT8 weights are widened to BF16, which is exact, and the sum
 * is multiplied by the float of its scale. */
#ifndef DE_KERNELS_CUDA_COMMON_CUH
#define DE_KERNELS_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

/* Deals out device memory from base on, in pieces that begin at multiples of 256; base NULL: to learn how much is `used`. */
struct de_cu_room {
    uint8_t *base;
    size_t used;
    template <class T> T *take(size_t n)
    {
        T *p = (T *)(base + used);
        used += (n * sizeof(T) + 255) / 256 * 256;
        return p;
    }
};

/* Programmatic dependent launch (sm_90): a kernel loads weights, which nobody writes, before cu_wait(), and what kernels before it
 * wrote behind it. Without the launch attribute both do nothing. */
__device__ __forceinline__ void cu_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void cu_release()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* 16 bytes that are read once: past L1. */
__device__ __forceinline__ uint4 cu_load(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* d += a b: a 16 x 16 of rows, b 16 x 8; registers as the PTX manual draws them. */
__device__ __forceinline__ void cu_mma(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two neighbouring tiles of b: b[0], b[1] and b[2], b[3]. */
__device__ __forceinline__ void cu_mma2(float d[2][4], const uint32_t a[4], const uint32_t b[4])
{
    cu_mma(d[0], a, b[0], b[1]);
    cu_mma(d[1], a, b[2], b[3]);
}

/* Four INT8 of a word in the order 0, 2, 1, 3 -> BF16 pairs (0, 1) and (2, 3). A byte q has the bits s and m (seven): 128 + m is
 * 0x4300 | m in BF16, and 128 or 256 is 0x4300 | s << 7; their difference is q, exactly. */
__device__ __forceinline__ void cu_widen(uint32_t w, uint32_t &lo, uint32_t &hi)
{
    const uint32_t one = 0x43004300u, m = 0x007F007Fu, s = 0x00800080u;
    const uint32_t v = w >> 8;
    const uint32_t a0 = (w & m) | one, c0 = (w & s) | one, a1 = (v & m) | one, c1 = (v & s) | one;
    const __nv_bfloat162 l = __hsub2(*(const __nv_bfloat162 *)&a0, *(const __nv_bfloat162 *)&c0);
    const __nv_bfloat162 h = __hsub2(*(const __nv_bfloat162 *)&a1, *(const __nv_bfloat162 *)&c1);
    lo = *(const uint32_t *)&l;
    hi = *(const uint32_t *)&h;
}

/* The two A fragments (k 0-15, 16-31) of a lane's part of an INT8 tile. */
__device__ __forceinline__ void cu_widen_tile(const uint4 &v, uint32_t a[2][4])
{
    cu_widen(v.x, a[0][0], a[0][2]);
    cu_widen(v.y, a[1][0], a[1][2]);
    cu_widen(v.z, a[0][1], a[0][3]);
    cu_widen(v.w, a[1][1], a[1][3]);
}

/* The same of a BF16 tile: its two loads. */
__device__ __forceinline__ void cu_bf16_tile(const uint4 &g, const uint4 &h, uint32_t a[2][4])
{
    a[0][0] = g.x, a[0][2] = g.y, a[1][0] = g.z, a[1][2] = g.w;
    a[0][1] = h.x, a[0][3] = h.y, a[1][1] = h.z, a[1][3] = h.w;
}

/* Of the lanes up to this one. */
template <class T> __device__ __forceinline__ T cu_rising_sum(T v)
{
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        const T u = __shfl_up_sync(~0u, v, d);
        v += (int)(threadIdx.x % 32) >= d ? u : 0;
    }
    return v;
}
__device__ __forceinline__ float cu_sum(float v) /* over a warp, the same in all lanes */
{
#pragma unroll
    for (int d = 16; d; d >>= 1)
        v += __shfl_xor_sync(0xFFFFFFFFu, v, d);
    return v;
}

__device__ __forceinline__ uint32_t cu_pack(float lo, float hi)
{
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *(const uint32_t *)&v;
}
__device__ __forceinline__ float cu_lo(uint32_t v)
{
    return __uint_as_float(v << 16);
}
__device__ __forceinline__ float cu_hi(uint32_t v)
{
    return __uint_as_float(v & 0xFFFF0000u);
}
__device__ __forceinline__ float cu_silu(float x)
{
    return x / (1.0f + __expf(-x));
}
__device__ __forceinline__ float cu_sigmoid(float x)
{
    return 1.0f / (1.0f + __expf(-x));
}

__device__ __forceinline__ float cu_softplus(float x)
{
    return x > 20.0f ? x : log1pf(expf(x));
}

/* Copies of 16 bytes into shared memory; where `valid` is false zeros are written. */
__device__ __forceinline__ void cu_copy16(void *shared, const void *global, bool valid = true)
{
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared), n = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(n)
                 : "memory");
}
__device__ __forceinline__ void cu_copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void cu_copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
/* Four 8 x 8 matrices of BF16: lane l gives the address of a row of matrix l / 8. */
__device__ __forceinline__ void cu_ldmatrix(uint32_t r[4], const void *shared)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}
__device__ __forceinline__ void cu_ldmatrix_transposed(uint32_t r[4], const void *shared)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

#endif
