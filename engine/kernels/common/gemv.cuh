/* gemv.cuh -- dot products of weight rows with one activation row, for a warp: what every decode kernel is made of.
 *
 * Decode at batch 1 reads each weight once, so all that counts is bytes in flight. A lane loads 16 bytes at a time, a warp 512
 * neighbouring ones; several rows and several loads of each are under way before the first is used. INT8 becomes float in
 * registers: v ^ 0x80 is the low byte of the float 8388608 + v + 128, made by one byte permutation.
 *
 * Sums are float, in an order that depends on the shape alone. Rows begin at multiples of 16 bytes and are whole multiples of
 * 16 bytes long.
 *
 * Programmatic dependent launch: a kernel loads weights, which nobody writes, before gemv_wait(), and activations behind it. */
#ifndef DE_KERNELS_COMMON_GEMV_CUH
#define DE_KERNELS_COMMON_GEMV_CUH

#include <cuda_bf16.h>
#include <stdint.h>

__device__ __forceinline__ void gemv_wait()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
/* The next kernel may begin to load its weights. */
__device__ __forceinline__ void gemv_release()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ uint4 gemv_load(const void *p)
{
    uint4 v; /* read once: past L1 */
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

struct de_int8 {
    static constexpr int N = 16; /* weights in 16 bytes */
    static __device__ __forceinline__ float at(const uint32_t w[4], int i)
    {
        const uint32_t v = w[i / 4] ^ 0x80808080u;
        return __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7440u | (uint32_t)(i % 4))) -
               8388736.0f;
    }
};
struct de_bf16 {
    static constexpr int N = 8;
    static __device__ __forceinline__ float at(const uint32_t w[4], int i)
    {
        return __uint_as_float(i % 2 ? w[i / 2] & 0xFFFF0000u : w[i / 2] << 16);
    }
};

/* N activations of bf16 as float. */
template <int N> __device__ __forceinline__ void gemv_x(const __nv_bfloat16 *x, float f[N])
{
#pragma unroll
    for (int k = 0; k < N / 8; k++) {
        const uint4 v = reinterpret_cast<const uint4 *>(x)[k];
        const uint32_t w[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
        for (int i = 0; i < 8; i++)
            f[8 * k + i] = de_bf16::at(w, i);
    }
}

template <class T> __device__ __forceinline__ float gemv_dot(const uint4 &v, const float f[T::N])
{
    const uint32_t w[4] = { v.x, v.y, v.z, v.w };
    float a = 0, b = 0;
#pragma unroll
    for (int i = 0; i < T::N; i += 2) {
        a = fmaf(T::at(w, i), f[i], a);
        b = fmaf(T::at(w, i + 1), f[i + 1], b);
    }
    return a + b;
}

__device__ __forceinline__ float gemv_sum(float v)
{
#pragma unroll
    for (int d = 16; d; d >>= 1)
        v += __shfl_xor_sync(0xFFFFFFFFu, v, d);
    return v;
}

#endif
