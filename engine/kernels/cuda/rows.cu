/* rows.cu -- what is done row by row: embedding, norms, rotary angles. */
#include "kernels/cuda/decode.cuh"

namespace
{

__global__ void embed_kernel(const bf16 *embed, const uint32_t *tokens, uint32_t hidden, float *h)
{
    const bf16 *from = embed + (size_t)tokens[blockIdx.x] * hidden;
    for (uint32_t i = threadIdx.x; i < hidden; i += blockDim.x)
        h[(size_t)blockIdx.x * hidden + i] = __bfloat162float(from[i]);
}

__global__ void gather_kernel(const float *h, const uint32_t *rows, uint32_t hidden, float *to)
{
    for (uint32_t i = threadIdx.x; i < hidden; i += blockDim.x)
        to[(size_t)blockIdx.x * hidden + i] = h[(size_t)rows[blockIdx.x] * hidden + i];
}

__global__ void __launch_bounds__(256)
    norm_kernel(const float *h, const float *norm, uint32_t k, float eps, bf16 *y)
{
    __shared__ float part[8];
    h += (size_t)blockIdx.x * k;
    float s = 0;
    for (uint32_t i = threadIdx.x * 4; i < k; i += 1024) {
        const float4 v = *(const float4 *)(h + i);
        s = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, s))));
    }
    s = cu_sum(s);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = s;
    __syncthreads();
    s = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        s += part[i];
    s = rsqrtf(s / (float)k + eps);
    for (uint32_t i = threadIdx.x * 4; i < k; i += 1024) {
        const float4 v = *(const float4 *)(h + i), g = *(const float4 *)(norm + i);
        *(uint2 *)(y + (size_t)blockIdx.x * k + i) =
            make_uint2(cu_pack(v.x * s * (1 + g.x), v.y * s * (1 + g.y)),
                       cu_pack(v.z * s * (1 + g.z), v.w * s * (1 + g.w)));
    }
}

/* The angle as the reference forms it: float position times float frequency, rounded to float. */
__global__ void rope_kernel(const uint32_t *pos, const float *inv_freq, const uint8_t *axis,
                            uint32_t half, float factor, float *rope)
{
    const uint32_t j = threadIdx.x;
    if (j >= half)
        return;
    const float angle = __fmul_rn((float)pos[blockIdx.x * 3 + axis[j]], inv_freq[j]);
    float s, c;
    sincosf(angle, &s, &c);
    rope[((size_t)blockIdx.x * 2) * half + j] = c * factor;
    rope[((size_t)blockIdx.x * 2 + 1) * half + j] = s * factor;
}

__device__ uint32_t read_sink;

__global__ void __launch_bounds__(512) read_kernel(const uint4 *p, size_t n)
{
    uint32_t sum = 0;
    const size_t step = (size_t)gridDim.x * blockDim.x;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 7 * step < n; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++)
            v[k] = cu_load(p + i + k * step);
#pragma unroll
        for (int k = 0; k < 8; k++)
            sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    for (; i < n; i += step)
        sum += p[i].x;
    if (sum == 0x12345678u) /* the compiler does not know */
        read_sink = sum;
}

} // namespace

void de_cu_read(cudaStream_t stream, const uint8_t *p, size_t n, uint32_t blocks)
{
    read_kernel<<<cu_multiprocessors() * blocks, 512, 0, stream>>>((const uint4 *)p, n / 16);
}

void de_cu_embed(cudaStream_t stream, const bf16 *embed, const uint32_t *tokens, uint32_t n,
                 uint32_t hidden, float *h)
{
    embed_kernel<<<n, 256, 0, stream>>>(embed, tokens, hidden, h);
}

void de_cu_gather(cudaStream_t stream, const float *h, const uint32_t *rows, uint32_t n,
                  uint32_t hidden, float *to)
{
    gather_kernel<<<n, 256, 0, stream>>>(h, rows, hidden, to);
}

void de_cu_norm(cudaStream_t stream, const float *h, const float *norm, uint32_t n, uint32_t k,
                float eps, bf16 *y)
{
    norm_kernel<<<n, 256, 0, stream>>>(h, norm, k, eps, y);
}

void de_cu_rope(cudaStream_t stream, const uint32_t *pos, const float *inv_freq,
                const uint8_t *axis, uint32_t n, uint32_t half, float factor, float *rope)
{
    rope_kernel<<<n, (half + 31) / 32 * 32, 0, stream>>>(pos, inv_freq, axis, half, factor, rope);
}
