/* decode.cuh -- what the decode kernels share: rows of x as fragments, sums of a block, launches. */
#ifndef DE_KERNELS_CUDA_DECODE_CUH
#define DE_KERNELS_CUDA_DECODE_CUH

#include "kernels/cuda/ops.cuh"

enum {
    CU_THREADS = 512,
    CU_WARPS = CU_THREADS / 32,
    CU_SUMS = CU_WARPS * 16 * 9 *
              4, /* bytes of one buffer of sums: [16 warps][16 outputs][8 rows + 1] floats */
};

/* Elements between rows of x in shared memory: reading fragments meets no bank twice. */
__host__ __device__ constexpr size_t cu_x_stride(uint32_t k)
{
    return k * 2 % 128 ? k : k + 32;
}

/* Where element k of a row stands in the order of fragments: a lane's eight of 32 are neighbours. */
__device__ __forceinline__ uint32_t cu_x_place(uint32_t k)
{
    const uint32_t j = k % 32; /* 8 (j / 8) + 2 t + i goes to 8 t + 2 (j / 8) + i */
    return k - j + (j % 8 / 2) * 8 + j / 8 * 2 + j % 2;
}
/* Four neighbours, k % 4 == 0. */
__device__ __forceinline__ void cu_x_put(bf16 *to, uint32_t k, float a, float b, float c, float d)
{
    *(uint32_t *)(to + cu_x_place(k)) = cu_pack(a, b);
    *(uint32_t *)(to + cu_x_place(k + 2)) = cu_pack(c, d);
}

/* n rows of x prepared by the whole block, n <= 8; `scratch`: 8 * 16 floats of shared memory. Ends with a barrier. */
template <int KIND>
__device__ __forceinline__ void cu_prepare(const de_cu_x &x, uint32_t n, uint32_t k, bf16 *to,
                                           float *scratch)
{
    const size_t ld = n == 1 ? 0 : cu_x_stride(k);
    if (KIND == DE_CU_X_PLAIN) {
        for (uint32_t i = threadIdx.x * 4; i < k * n; i += CU_THREADS * 4) {
            const uint32_t row = i / k, at = i % k;
            const uint2 v = *(const uint2 *)(x.x + row * x.ldx + at);
            *(uint32_t *)(to + row * ld + cu_x_place(at)) = v.x;
            *(uint32_t *)(to + row * ld + cu_x_place(at + 2)) = v.y;
        }
    } else if (KIND == DE_CU_X_NORM) {
        for (uint32_t row = 0; row < n; row++) {
            float s = 0;
            for (uint32_t i = threadIdx.x * 4; i < k; i += CU_THREADS * 4) {
                const float4 v = __ldcg((const float4 *)(x.f + (size_t)row * k + i));
                s = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, s))));
            }
            s = cu_sum(s);
            if (threadIdx.x % 32 == 0)
                scratch[row * CU_WARPS + threadIdx.x / 32] = s;
        }
        __syncthreads();
        for (uint32_t row = 0; row < n; row++) {
            float s = 0;
#pragma unroll
            for (int w = 0; w < CU_WARPS; w++)
                s += scratch[row * CU_WARPS + w];
            s = rsqrtf(s / (float)k + x.eps);
            for (uint32_t i = threadIdx.x * 4; i < k; i += CU_THREADS * 4) {
                const float4 v = __ldcg((const float4 *)(x.f + (size_t)row * k + i)),
                             g = *(const float4 *)(x.norm + i);
                cu_x_put(to + row * ld, i, v.x * s * (1 + g.x), v.y * s * (1 + g.y),
                         v.z * s * (1 + g.z), v.w * s * (1 + g.w));
            }
        }
    } else {
        const uint32_t lane = threadIdx.x % 32;
        for (uint32_t i = threadIdx.x / 32 * 128; i < k * n; i += CU_WARPS * 128) {
            const uint32_t row = i / k, at = i % k + lane * 4;
            const float4 v = *(const float4 *)(x.f + (size_t)row * k + at),
                         g = *(const float4 *)(x.norm + lane * 4);
            const uint2 z = *(const uint2 *)(x.x + row * x.ldx + at);
            const float s = rsqrtf(
                cu_sum(fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)))) / DE_CU_GDN +
                x.eps);
            cu_x_put(to + row * ld, at, v.x * s * g.x * cu_silu(cu_lo(z.x)),
                     v.y * s * g.y * cu_silu(cu_hi(z.x)), v.z * s * g.z * cu_silu(cu_lo(z.y)),
                     v.w * s * g.w * cu_silu(cu_hi(z.y)));
        }
    }
    __syncthreads();
}

/* Products of a warp's tiles (w, w + 16, ...) of one row of tiles with eight rows of x. p: this lane's row of x in the order of
 * fragments, at lane % 4 * 8. With scale groups, the scales of the 16 outputs from `out` on are applied here. */
template <bool INT8, bool GROUPS, int KT, bool SHARED, int L>
__device__ __forceinline__ void cu_row_sums(const uint4 (*v)[L], const bf16 *p, uint32_t tiles,
                                            const float *scale, uint32_t groups, uint32_t group,
                                            uint32_t out, float total[4])
{
    static_assert(INT8 || L == 2, "BF16 tiles take two loads");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float acc[4] = { 0, 0, 0, 0 };
    if (GROUPS)
        total[0] = total[1] = total[2] = total[3] = 0;
#pragma unroll
    for (int k = 0; k < KT; k++) {
        const uint32_t c = warp + 16 * k;
        if (c >= tiles)
            break;
        const uint4 b = SHARED ? *(const uint4 *)(p + c * 32) : __ldg((const uint4 *)(p + c * 32));
        uint32_t a[2][4];
        if (INT8) {
            cu_widen_tile(v[k][0], a);
        } else {
            cu_bf16_tile(v[k][0], v[k][L - 1], a);
        }
        cu_mma(acc, a[0], b.x, b.y);
        cu_mma(acc, a[1], b.z, b.w);
        if (GROUPS) {
            const float *s = scale + (size_t)(out + lane / 4) * groups + c * 32 / group;
            const float lo = s[0], hi = s[8 * groups];
            total[0] = fmaf(acc[0], lo, total[0]);
            total[1] = fmaf(acc[1], lo, total[1]);
            total[2] = fmaf(acc[2], hi, total[2]);
            total[3] = fmaf(acc[3], hi, total[3]);
            acc[0] = acc[1] = acc[2] = acc[3] = 0;
        }
    }
    if (!GROUPS)
#pragma unroll
        for (int i = 0; i < 4; i++)
            total[i] = acc[i];
}

/* This warp's part of 16 outputs x 8 rows, into its place. */
__device__ __forceinline__ void cu_put_sums(float *sums, const float acc[4])
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float *to = sums + warp * 16 * 9;
    to[g * 9 + 2 * t] = acc[0];
    to[g * 9 + 2 * t + 1] = acc[1];
    to[(g + 8) * 9 + 2 * t] = acc[2];
    to[(g + 8) * 9 + 2 * t + 1] = acc[3];
}
__device__ __forceinline__ float cu_get_sum(const float *sums, uint32_t token, uint32_t out)
{
    float y = 0;
#pragma unroll
    for (int w = 0; w < CU_WARPS; w++)
        y += sums[w * 16 * 9 + out * 9 + token];
    return y;
}

/* Block `block` of `blocks` fetches its part of what lies ahead into L2. */
__device__ __forceinline__ void cu_fetch_ahead(const de_cu_ahead &a, uint32_t block,
                                               uint32_t blocks)
{
    const size_t line = 128, lines = (a.n + line - 1) / line, first = lines * block / blocks,
                 end = lines * (block + 1) / blocks;
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(a.p + i * line));
}

/* ---- host */

enum { CU_AHEAD_BLOCKS = 64 };

inline uint32_t cu_multiprocessors()
{
    static uint32_t n;
    if (!n) {
        int device = 0, count = 1;
        (void)cudaGetDevice(&device);
        (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
        n = (uint32_t)count;
    }
    return n;
}
/* Major compute capability of the device. */
inline int cu_major()
{
    static int major;
    if (!major) {
        int device = 0;
        (void)cudaGetDevice(&device);
        (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    }
    return major;
}
/* Blocks of one an SM for that many pieces of work. */
inline uint32_t cu_blocks(uint32_t pieces)
{
    return pieces < cu_multiprocessors() ? pieces : cu_multiprocessors();
}

template <class... P, class... A>
void cu_launch_threads(void (*kernel)(P...), dim3 grid, uint32_t threads, size_t shared,
                       cudaStream_t stream, bool dependent, A... a)
{
    if (shared > 40 * 1024) /* the limit is 48 KiB with what the kernel itself declares */
        (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)shared);
    cudaLaunchConfig_t c = {};
    cudaLaunchAttribute attribute = {};
    c.gridDim = grid;
    c.blockDim = dim3(threads);
    c.dynamicSmemBytes = shared;
    c.stream = stream;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    c.attrs = &attribute;
    c.numAttrs = dependent ? 1 : 0;
    (void)cudaLaunchKernelEx(&c, kernel, (P)a...);
}
template <class... P, class... A>
void cu_launch(void (*kernel)(P...), dim3 grid, size_t shared, cudaStream_t stream, bool dependent,
               A... a)
{
    cu_launch_threads(kernel, grid, CU_THREADS, shared, stream, dependent, a...);
}

#endif
