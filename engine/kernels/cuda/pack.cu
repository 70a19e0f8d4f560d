/* pack.cu -- weights as a checkpoint stores them into the order of the kernels, and random ones. */
#include <cuda_fp16.h>

#include "kernels/cuda/ops.cuh"

namespace
{

__device__ __forceinline__ float value(const uint8_t *p, de_cu_type type, size_t i)
{
    if (type == DE_CU_T_F32) /* staged at multiples of 16 */
        return ((const float *)p)[i];
    if (type == DE_CU_T_BF16)
        return __bfloat162float(((const bf16 *)p)[i]);
    return __half2float(((const __half *)p)[i]);
}

__device__ __forceinline__ float scale_of(const de_cu_stored &f, uint32_t row, uint32_t g)
{
    return value(f.scale, f.scale_type, f.scale_whole ? 0 : (size_t)row * (f.in / f.group) + g);
}

__device__ __forceinline__ uint32_t place(uint32_t r, uint32_t row0, de_cu_order order)
{
    return row0 + (order == DE_CU_ROWS ? r : r / 8 * 16 + r % 8 + (order == DE_CU_UP ? 8 : 0));
}

/* A thread makes one lane's half of a tile: a row's eight columns. */
__global__ void pack_kernel(de_cu_stored f, de_cu_linear to, uint32_t row0, de_cu_order order,
                            uint32_t *bad)
{
    const uint32_t tiles = f.in / 32, r = blockIdx.y, at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= tiles * 4)
        return;
    const uint32_t c = at / 4, t = at % 4, row = place(r, row0, order);
    const uint8_t *src = f.w + r * f.row_bytes;
    const size_t tile = (size_t)(row / 16) * tiles + c, lane = row % 8 * 4 + t;
    if (to.scale) {
        uint8_t b[8];
#pragma unroll
        for (int i = 0; i < 8; i++) /* in a word of four: 0, 2, 1, 3 */
        {
            const int item = i / 4 * 4 + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4);
            b[i] = src[c * 32 + item / 2 * 8 + t * 2 + item % 2] ^ 0x80;
        }
        uint2 v;
        v.x = b[0] | b[1] << 8 | b[2] << 16 | (uint32_t)b[3] << 24;
        v.y = b[4] | b[5] << 8 | b[6] << 16 | (uint32_t)b[7] << 24;
        *(uint2 *)(uintptr_t)(to.w + tile * 512 + lane * 16 + row % 16 / 8 * 8) = v;
        const float s = scale_of(f, r, c * 32 / f.group);
        if (!isfinite(s))
            atomicOr(bad, 1);
        if (s == 0 && (v.x | v.y))
            atomicOr(bad, 2);
        if (t == 0 && c * 32 % f.group == 0)
            ((float *)to.scale)[(size_t)row * (f.in / f.group) + c * 32 / f.group] = s;
    } else {
        uint32_t v[4];
        bool fine = true;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t k = c * 32 + i * 8 + t * 2 + j;
                x[j] = f.type == DE_CU_T_INT8
                           ? (float)((int)src[k] - 128) * scale_of(f, r, k / f.group)
                           : value(src, f.type, k);
                fine = fine && isfinite(x[j]);
            }
            v[i] = cu_pack(x[0], x[1]);
        }
        if (!fine)
            atomicOr(bad, 1);
        *(uint4 *)(uintptr_t)(to.w + tile * 1024 + row % 16 / 8 * 512 + lane * 16) =
            make_uint4(v[0], v[1], v[2], v[3]);
    }
}

__global__ void rows_kernel(de_cu_stored f, bf16 *to, uint32_t *bad)
{
    const uint32_t r = blockIdx.y, k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= f.in)
        return;
    const float x = value(f.w + r * f.row_bytes, f.type, k);
    if (!isfinite(x))
        atomicOr(bad, 1);
    to[(size_t)r * f.in + k] = __float2bfloat16(x);
}

__global__ void vector_kernel(de_cu_type type, const uint8_t *from, uint32_t n, de_cu_vector how,
                              float *to, uint32_t *bad)
{
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    float v = value(from, type, i);
    v = how == DE_CU_V_NEG_EXP ? (float)-exp((double)v) : v;
    if (!isfinite(v))
        atomicOr(bad, 1);
    to[how == DE_CU_V_CONV ? i % 4 * (n / 4) + i / 4 : i] = v;
}

__device__ __forceinline__ uint64_t mix(uint64_t v) /* splitmix64 */
{
    v += 0x9E3779B97F4A7C15u;
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9u;
    v = (v ^ v >> 27) * 0x94D049BB133111EBu;
    return v ^ v >> 31;
}
/* A sum of four uniforms: mean 0, deviation 1 */
__device__ __forceinline__ float noise(uint64_t v)
{
    const float s = (float)(v & 0xFFFF) + (float)(v >> 16 & 0xFFFF) + (float)(v >> 32 & 0xFFFF) +
                    (float)(v >> 48);
    return (s - 131070.0f) * (1.7320508f / 65536.0f);
}

__global__ void noise_kernel(uint32_t *to, size_t n, float amplitude, uint64_t seed)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] =
            cu_pack(amplitude * noise(mix(seed + 2 * i)), amplitude * noise(mix(seed + 2 * i + 1)));
}
__global__ void bits_kernel(uint64_t *to, size_t n, uint64_t seed)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] = mix(seed + i);
}
__global__ void uniform_kernel(float *to, size_t n, float low, float high, uint64_t seed)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] = low + (high - low) * (float)(mix(seed + i) >> 40) * 0x1p-24f;
}

} // namespace

void de_cu_pack_linear(cudaStream_t stream, const de_cu_stored &from, const de_cu_linear &to,
                       uint32_t row0, de_cu_order order, uint32_t *bad)
{
    const uint32_t lanes = from.in / 8, threads = lanes < 256 ? (lanes + 31) / 32 * 32 : 256;
    pack_kernel<<<dim3((lanes + threads - 1) / threads, from.rows), threads, 0, stream>>>(
        from, to, row0, order, bad);
}

void de_cu_pack_rows(cudaStream_t stream, const de_cu_stored &from, bf16 *to, uint32_t *bad)
{
    rows_kernel<<<dim3((from.in + 255) / 256, from.rows), 256, 0, stream>>>(from, to, bad);
}

void de_cu_pack_vector(cudaStream_t stream, de_cu_type type, const uint8_t *from, uint32_t n,
                       de_cu_vector how, float *to, uint32_t *bad)
{
    vector_kernel<<<(n + 255) / 256, 256, 0, stream>>>(type, from, n, how, to, bad);
}

void de_cu_fill_linear(cudaStream_t stream, const de_cu_linear &to, uint64_t seed)
{
    const size_t rows = (to.out + 15) / 16 * 16, n = rows * to.in;
    if (to.scale) {
        const float s = 1.0f / (74.0f * sqrtf((float)to.in));
        bits_kernel<<<1024, 256, 0, stream>>>((uint64_t *)(uintptr_t)to.w, n / 8, seed);
        uniform_kernel<<<64, 256, 0, stream>>>(
            (float *)(uintptr_t)to.scale, rows * (to.in / to.group), 0.9f * s, 1.1f * s, seed + 1);
    } else {
        noise_kernel<<<1024, 256, 0, stream>>>((uint32_t *)(uintptr_t)to.w, n / 2,
                                               1.0f / sqrtf((float)to.in), seed);
    }
}

void de_cu_fill_rows(cudaStream_t stream, bf16 *to, size_t n, float amplitude, uint64_t seed)
{
    noise_kernel<<<1024, 256, 0, stream>>>((uint32_t *)to, n / 2, amplitude, seed);
}

void de_cu_fill_vector(cudaStream_t stream, float *to, uint32_t n, float low, float high,
                       uint64_t seed)
{
    uniform_kernel<<<64, 256, 0, stream>>>(to, n, low, high, seed);
}
