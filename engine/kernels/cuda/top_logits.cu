/* top_logits.cu -- see top_logits.cuh: exact, and twice over the row at most where logits are as models write them.
 *
 * A row is cut into GROUPS groups of neighbours. maxima_kernel finds each one's largest logit. The 64th largest of these is a bound:
 * 64 logits are at least that large, and what is below it is not among the first 64. top_kernel, a block for each row, reads the groups
 * again that reach the bound (64 of 1,024, but for ties), gathers the logits that do, and ranks them by counting who goes before. Where
 * there are more than LIST of those, the bound is raised to the 64th in rank by bisection over its bits.
 *
 * Logits are compared as integers in the order of floats; a logit and its id make one number, no two of which are equal. */
#include "kernels/cuda/top_logits.cuh"

namespace
{

enum { GROUPS = 1024, LIST = 2048, WARPS = 32, TOP = DE_TOP_LOGITS };

const float LARGEST_FLOAT = 3.402823466e38f;
const uint32_t LARGEST = 0xFF7FFFFFu,
               UNSOUND = 0xFFFFFFFFu; /* of key_of(): the largest finite one */

__device__ __forceinline__ uint32_t key_of(float v)
{
    const uint32_t u = __float_as_uint(v + 0.0f); /* -0 is +0 */
    return u >> 31 ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key)
{
    return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}
/* First in rank is largest. */
__device__ __forceinline__ uint64_t ranked(float v, uint32_t id)
{
    return (uint64_t)key_of(v) << 32 | (0xFFFFFFFFu - id);
}

/* A warp: a group. maxima [rows][GROUPS]: 0 if no id of it counts, UNSOUND if it holds a NaN or +inf. */
__global__ void __launch_bounds__(256)
    maxima_kernel(const float *logits, uint32_t vocab, uint32_t n_ids, uint32_t each,
                  uint32_t *maxima)
{
    const uint32_t group = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32,
                   first = group * each, end = min(first + each, vocab);
    const float *row = logits + (size_t)blockIdx.y * vocab;
    uint32_t most = 0;
    for (uint32_t i = first + lane; i < end; i += 32) {
        const float v = row[i];
        if (!(v <= LARGEST_FLOAT))
            most = UNSOUND;
        else if (i < n_ids && v >= -LARGEST_FLOAT) /* -inf is never drawn */
            most = max(most, key_of(v));
    }
    most = __reduce_max_sync(0xFFFFFFFFu, most);
    if (lane == 0)
        maxima[blockIdx.y * GROUPS + group] = most;
}

/* Calls f(ranked logit) for those of the groups that reach the bound; a warp takes a group. */
template <class F>
__device__ __forceinline__ void each_of(const float *row, const uint32_t *maxima, uint32_t bound,
                                        uint32_t each, uint32_t n_ids, F f)
{
    for (uint32_t group = threadIdx.x / 32; group < GROUPS; group += WARPS) {
        if (maxima[group] < bound)
            continue;
        const uint32_t first = group * each, end = min(first + each, n_ids);
        for (uint32_t i = first + threadIdx.x % 32; i < end; i += 32)
            if (row[i] >= -LARGEST_FLOAT)
                f(ranked(row[i], i));
    }
}

__global__ void __launch_bounds__(GROUPS)
    top_kernel(const float *logits, uint32_t vocab, uint32_t n_ids, uint32_t each,
               const uint32_t *maxima, de_top_logits *tops)
{
    __shared__ uint32_t reach[GROUPS], count;
    __shared__ uint64_t list[LIST];
    const float *row = logits + (size_t)blockIdx.x * vocab;
    de_top_logits *to = tops + blockIdx.x;
    const uint32_t mine = maxima[blockIdx.x * GROUPS + threadIdx.x];
    reach[threadIdx.x] = mine;
    if (threadIdx.x == 0)
        count = 0;
    if (__syncthreads_or(mine > LARGEST)) { /* the barrier for reach and count, too */
        if (threadIdx.x == 0) {
            to->n = 1;
            to->is_sound = 0;
        }
        return;
    }
    uint32_t bound = 0; /* the TOP-th largest */
    for (uint32_t bit = 1u << 31; bit; bit >>= 1)
        if (__syncthreads_count(mine >= (bound | bit)) >= TOP)
            bound |= bit;
    bound = max(bound, 1);
    auto gather = [&](uint64_t least) {
        each_of(row, reach, bound, each, n_ids, [&](uint64_t v) {
            if (v >= least) {
                const uint32_t at = atomicAdd(&count, 1);
                if (at < LIST)
                    list[at] = v;
            }
        });
        __syncthreads(); /* list and count are whole */
    };
    gather((uint64_t)bound << 32);
    if (count > LIST) {
        uint64_t least = 0;
        for (int bit = 63; bit >= 0; bit--) {
            const uint64_t v = least | 1ull << bit;
            uint32_t n = 0;
            __syncthreads(); /* count is read */
            if (threadIdx.x == 0)
                count = 0;
            __syncthreads();
            each_of(row, reach, bound, each, n_ids, [&](uint64_t x) { n += x >= v; });
            n = __reduce_add_sync(0xFFFFFFFFu, n);
            if (threadIdx.x % 32 == 0)
                atomicAdd(&count, n);
            __syncthreads();
            least = count >= TOP ? v : least;
        }
        __syncthreads();
        if (threadIdx.x == 0)
            count = 0;
        __syncthreads();
        gather(least);
    }
    const uint32_t n = count;
    for (uint32_t i = threadIdx.x; i < n; i += GROUPS) {
        const uint64_t v = list[i];
        uint32_t before = 0;
        for (uint32_t k = 0; k < n; k++)
            before += list[k] > v;
        if (before < TOP) {
            to->of[before].logit = value_of((uint32_t)(v >> 32));
            to->of[before].id = 0xFFFFFFFFu - (uint32_t)v;
        }
    }
    if (threadIdx.x == 0) {
        to->n = n < TOP ? n : TOP;
        to->is_sound = 1;
    }
}

} // namespace

size_t de_cu_top_logits_bytes(uint32_t rows)
{
    return (size_t)rows * GROUPS * sizeof(uint32_t);
}

void de_cu_top_logits(cudaStream_t stream, const float *logits, uint32_t rows, uint32_t vocab,
                      uint32_t n_ids, de_top_logits *tops, void *workspace)
{
    const uint32_t each = (vocab + GROUPS - 1) / GROUPS;
    maxima_kernel<<<dim3(GROUPS / 8, rows), 256, 0, stream>>>(logits, vocab, n_ids, each,
                                                              (uint32_t *)workspace);
    top_kernel<<<rows, GROUPS, 0, stream>>>(logits, vocab, n_ids, each, (const uint32_t *)workspace,
                                            tops);
}
