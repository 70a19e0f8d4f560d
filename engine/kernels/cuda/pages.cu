/* pages.cu -- pages of keys and values between the device and locked memory of the host.
 *
 * The parts of a page lie a layer apart on the device: a copy of each by the driver costs the caller some microseconds a page, and
 * sixteen hundred pages are a session. Here the SMs read or write the host's memory themselves, 64 pages a launch. */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ops.cuh"

namespace
{

/* A block: one part of one page. */
__global__ void __launch_bounds__(256)
    pages_kernel(uint8_t *kv, size_t apart, uint32_t part_bytes, const de_cu_pages list, bool to_host)
{
    uint4 *const device = (uint4 *)(kv + blockIdx.y * apart + (size_t)list.page[blockIdx.x] * part_bytes);
    uint4 *const host = (uint4 *)(list.host[blockIdx.x] + (size_t)blockIdx.y * part_bytes);
    const uint4 *const from = to_host ? device : host;
    uint4 *const to = to_host ? host : device;
    const uint32_t n = part_bytes / sizeof(uint4);
    enum { AT_ONCE = 4 }; /* loads under way a thread */
    uint32_t i = threadIdx.x;
    for (; i + (AT_ONCE - 1) * blockDim.x < n; i += AT_ONCE * blockDim.x) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++)
            v[k] = __ldcs(from + i + k * blockDim.x);
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++)
            __stcs(to + i + k * blockDim.x, v[k]);
    }
    for (; i < n; i += blockDim.x)
        __stcs(to + i, __ldcs(from + i));
}

} // namespace

void de_cu_copy_pages(cudaStream_t stream, uint8_t *kv, size_t apart, size_t part_bytes, uint32_t n_parts,
                      const de_cu_pages &list, bool to_host)
{
    pages_kernel<<<dim3(list.n, n_parts), 256, 0, stream>>>(kv, apart, (uint32_t)part_bytes, list, to_host);
}
