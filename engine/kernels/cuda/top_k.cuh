/* top_k.cuh -- the chosen experts of a row. */
#ifndef DE_KERNELS_CUDA_TOP_K_CUH
#define DE_KERNELS_CUDA_TOP_K_CUH

#include "kernels/cuda/common.cuh"

/* The k largest of E logits and the softmax over them, by a warp: lane j has the j-th. Ties: the lower id. */
template <int PER>
__device__ __forceinline__ void cu_top_k(const float *logits, uint32_t E, uint32_t k,
                                         uint32_t &ret_id, float &ret_weight)
{
    const uint32_t lane = threadIdx.x % 32;
    uint32_t key[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const uint32_t e = i * 32 + lane;
        const uint32_t b = e < E ? __float_as_uint(__ldcg(logits + e) + 0.0f) : 0;
        key[i] = e >= E    ? 0
                 : b >> 31 ? max(~b, 1u)
                           : b | 0x80000000u; /* orders as the floats do, -0 being 0; 0 is none */
    }
    float mine = 0, sum = 0, first = 0;
    for (uint32_t t = 0; t < k; t++) {
        uint32_t best = key[0];
#pragma unroll
        for (int i = 1; i < PER; i++)
            best = max(best, key[i]);
        best = __reduce_max_sync(~0u, best);
        uint32_t at = ~0u; /* the lowest id that has it */
#pragma unroll
        for (int i = PER - 1; i >= 0; i--)
            at = key[i] == best && i * 32 + lane < E ? i * 32 + lane : at;
        at = __reduce_min_sync(~0u, at);
#pragma unroll
        for (int i = 0; i < PER; i++)
            key[i] = i * 32 + lane == at ? 0 : key[i];
        const float value = __uint_as_float(best >> 31 ? best & 0x7FFFFFFFu : ~best);
        if (t == 0)
            first = value;
        const float p = expf(value - first);
        sum += p;
        if (lane == t) {
            mine = p;
            ret_id = at;
        }
    }
    ret_weight = mine / sum;
}

#endif
