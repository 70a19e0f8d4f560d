/* attn_decode.cu -- attention of one new row a sequence over its pages.
 *
 * A block has up to eight query heads of a KV head and a part of the context: 256 tokens, doubled until 64 parts are enough. Its four
 * warps take its pages in turn, each with a running maximum; scores are K q with tokens as the rows of mma and heads as its
 * columns, the output is V' p with dims as rows. Parts meet in a second kernel, in order. The block with the newest token writes that
 * token's key and value to their page first. */
#include "kernels/cuda/attn.cuh"

namespace
{

enum { PART = 256, PARTS = 64, HEADS = 8, WARPS = 4, P_LD = A_P + 32 };

struct part_sums {
    float o[HEADS][A_D], max[HEADS], sum[HEADS];
};

/* Tokens of one part of a context of n. */
__device__ __forceinline__ uint32_t part_tokens(uint32_t n)
{
    uint32_t t = PART;
    while (t * PARTS < n)
        t *= 2;
    return t;
}

template <bool FP8>
__global__ void __launch_bounds__(WARPS * 32)
    part_kernel(const de_cu_attn a, const bf16 *p, size_t ldp, const float *rope,
                const de_cu_seq *seqs, const uint32_t *pages, part_sums *parts)
{
    typedef kv_format<FP8> F;
    constexpr int L = F::LANE, STEPS = L / 4; /* values of 16 bytes; mma steps of them */
    __shared__ __align__(16) uint16_t q[HEADS][A_D + 32];
    __shared__ __align__(16) uint16_t probability[WARPS][HEADS][P_LD];
    __shared__ float o_sum[WARPS][HEADS][A_D + 4], maxima[WARPS][HEADS], sums[WARPS][HEADS];
    const uint32_t per = a.q_heads / a.kv_heads, groups = (per + HEADS - 1) / HEADS;
    const uint32_t split = blockIdx.x, kv_head = blockIdx.y / groups, group = blockIdx.y % groups,
                   seq = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4,
                   t = lane % 4;
    const uint32_t n_heads = min((uint32_t)HEADS, per - group * HEADS),
                   head0 = kv_head * per + group * HEADS;
    const uint32_t n = seqs[seq].start + 1, size = part_tokens(n), first = split * size,
                   end = min(first + size, n);
    cu_release();
    if (first >= n) {
        cu_wait();
        return;
    }
    pages += seqs[seq].page0;
    if (first + warp * A_P <
        end) { /* this warp's first page into L2: nobody writes what is old in it */
        const uint8_t *page = a.kv + pages[first / A_P + warp] * a.page_bytes +
                              (size_t)kv_head * 2 * A_P * A_D * F::SIZE;
        for (uint32_t i = lane * 128; i < 2 * A_P * A_D * F::SIZE; i += 32 * 128)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(page + i));
    }
    cu_wait();
    p += seq * ldp;
    rope += seq * a.rotary;
    for (uint32_t h = warp; h < HEADS; h += WARPS) {
        float v[8];
        if (h < n_heads)
            head_values(p + (size_t)(head0 + h) * 2 * A_D, a.q_norm, a.eps, rope, a.rotary, 0.0625f,
                        o_sum[warp][0], v);
#pragma unroll
        for (int i = 0; i < 8; i++)
            q[h][i * 32 + lane] = h < n_heads ? F::one(v[i]) : 0;
    }
    if (end == n && warp == WARPS - 1) /* every group writes the same */
        put_kv<FP8>(a, p, rope, kv_head, pages[(n - 1) / A_P], (n - 1) % A_P, o_sum[warp][0]);
    __syncthreads();
    float acc[A_D / 16][4] = {}, max[2] = { -INFINITY, -INFINITY }, sum[2] = { 0, 0 };
    for (uint32_t base = first + warp * A_P; base < end; base += WARPS * A_P) {
        const uint8_t *k = a.kv + pages[base / A_P] * a.page_bytes +
                           (size_t)kv_head * 2 * A_P * A_D * F::SIZE,
                      *v = k + (size_t)A_P * A_D * F::SIZE;
        float s[A_P / 16][4] = {};
#pragma unroll
        for (int i = 0; i < A_P / 16; i++) {
            uint4 rows[A_D / (4 * L)][2];
#pragma unroll
            for (int c = 0; c < A_D / (4 * L); c++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    rows[c][r] = __ldcg((const uint4 *)(k + (size_t)((i * 16 + g + 8 * r) * A_D +
                                                                     c * 4 * L + t * L) *
                                                                F::SIZE));
#pragma unroll
            for (int c = 0; c < A_D / (4 * L); c++) {
                uint32_t lo[L / 2], hi[L / 2];
                F::widen(rows[c][0], lo);
                F::widen(rows[c][1], hi);
                const uint32_t *b = (const uint32_t *)&q[g][c * 4 * L + t * L];
#pragma unroll
                for (int e = 0; e < STEPS; e++) {
                    const uint32_t x[4] = { lo[2 * e], hi[2 * e], lo[2 * e + 1], hi[2 * e + 1] };
                    F::mma(s[i], x, b[2 * e], b[2 * e + 1]);
                }
            }
        }
        /* s[i]: tokens 16 i + g and + 8, heads 2 t and 2 t + 1 */
        float top[2] = { max[0], max[1] };
#pragma unroll
        for (int i = 0; i < A_P / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (base + i * 16 + g + e / 2 * 8 >= end)
                    s[i][e] = -INFINITY;
                top[e % 2] = fmaxf(top[e % 2], s[i][e]);
            }
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int d = 4; d < 32; d <<= 1)
                top[e] = fmaxf(top[e], __shfl_xor_sync(~0u, top[e], d));
            const float fade = __expf(max[e] - top[e]);
            sum[e] *= fade;
            max[e] = top[e];
#pragma unroll
            for (int i = 0; i < A_D / 16; i++) {
                acc[i][e] *= fade;
                acc[i][e + 2] *= fade;
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < A_P / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float x = __expf(s[i][e] - max[e % 2]);
                sum[e % 2] += x;
                probability[warp][2 * t + e % 2][i * 16 + g + e / 2 * 8] = F::one(x);
            }
        __syncwarp();
#pragma unroll
        for (int c = 0; c < A_P / (4 * L); c++) {
            uint32_t b[L / 2];
#pragma unroll
            for (int j = 0; j < L / 8; j++)
                *(uint4 *)&b[4 * j] =
                    *(const uint4 *)&probability[warp][g][c * 4 * L + t * L + 8 * j];
#pragma unroll
            for (int i = 0; i < A_D / 16; i++) {
                uint32_t lo[L / 2], hi[L / 2];
                F::widen(
                    __ldcg((const uint4 *)(v + (size_t)((i * 16 + g) * A_P + c * 4 * L + t * L) *
                                                   F::SIZE)),
                    lo);
                F::widen(__ldcg((const uint4 *)(v + (size_t)((i * 16 + g + 8) * A_P + c * 4 * L +
                                                             t * L) *
                                                        F::SIZE)),
                         hi);
#pragma unroll
                for (int e = 0; e < STEPS; e++) {
                    const uint32_t x[4] = { lo[2 * e], hi[2 * e], lo[2 * e + 1], hi[2 * e + 1] };
                    F::mma(acc[i], x, b[2 * e], b[2 * e + 1]);
                }
            }
        }
    }
    /* the warps' sums into one, in order */
#pragma unroll
    for (int e = 0; e < 2; e++)
#pragma unroll
        for (int d = 4; d < 32; d <<= 1)
            sum[e] += __shfl_xor_sync(~0u, sum[e], d);
    if (g == 0)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            maxima[warp][2 * t + e] = max[e];
            sums[warp][2 * t + e] = sum[e];
        }
    __syncthreads();
    float all[2], fade[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        all[e] = maxima[0][2 * t + e]; /* warp 0 has a page */
#pragma unroll
        for (int w = 1; w < WARPS; w++)
            all[e] = fmaxf(all[e], maxima[w][2 * t + e]);
        fade[e] = __expf(max[e] - all[e]);
    }
#pragma unroll
    for (int i = 0; i < A_D / 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            o_sum[warp][2 * t + e % 2][i * 16 + g + e / 2 * 8] = acc[i][e] * fade[e % 2];
    __syncthreads();
    part_sums &to = parts[((size_t)seq * gridDim.y + blockIdx.y) * PARTS + split];
    for (uint32_t i = threadIdx.x; i < HEADS * A_D; i += WARPS * 32) {
        float x = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            x += o_sum[w][i / A_D][i % A_D];
        to.o[i / A_D][i % A_D] = x;
    }
    if (warp == 0 && g == 0)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                total += sums[w][2 * t + e] * __expf(maxima[w][2 * t + e] - all[e]);
            to.max[2 * t + e] = all[e];
            to.sum[2 * t + e] = total;
        }
}

/* A block: a query head of a sequence; thread: a dim. */
__global__ void __launch_bounds__(A_D)
    merge_kernel(const de_cu_attn a, const bf16 *p, size_t ldp, const de_cu_seq *seqs,
                 const part_sums *parts, bf16 *y)
{
    const uint32_t head = blockIdx.x, seq = blockIdx.y, per = a.q_heads / a.kv_heads,
                   groups = (per + HEADS - 1) / HEADS, h = head % per % HEADS, d = threadIdx.x;
    const uint32_t n = seqs[seq].start + 1, size = part_tokens(n), n_parts = (n + size - 1) / size;
    cu_release();
    cu_wait();
    const part_sums *from =
        parts +
        ((size_t)seq * a.kv_heads * groups + head / per * groups + head % per / HEADS) * PARTS;
    float max = from[0].max[h], sum = 0, o = 0;
    for (uint32_t i = 1; i < n_parts; i++)
        max = fmaxf(max, from[i].max[h]);
    for (uint32_t i = 0; i < n_parts; i++) {
        const float f = __expf(from[i].max[h] - max);
        sum = fmaf(from[i].sum[h], f, sum);
        o = fmaf(from[i].o[h][d], f, o);
    }
    const float gate = __bfloat162float(p[seq * ldp + ((size_t)head * 2 + 1) * A_D + d]);
    y[(size_t)seq * a.q_heads * A_D + (size_t)head * A_D + d] =
        __float2bfloat16(o / sum * cu_sigmoid(gate));
}

uint32_t head_groups(const de_cu_attn &a)
{
    return a.kv_heads * ((a.q_heads / a.kv_heads + HEADS - 1) / HEADS);
}

} // namespace

size_t de_cu_attn_decode_bytes(const de_cu_attn &a, uint32_t n_seqs)
{
    return (size_t)n_seqs * head_groups(a) * PARTS * sizeof(part_sums);
}

void de_cu_attn_decode(cudaStream_t stream, const de_cu_attn &a, const bf16 *p, size_t ldp,
                       const float *rope, const de_cu_seq *seqs, const uint32_t *pages,
                       uint32_t n_seqs, uint32_t ctx_max, bf16 *y, void *workspace, bool dependent)
{
    uint32_t n_parts = (ctx_max + PART - 1) / PART;
    n_parts = n_parts < PARTS ? n_parts : PARTS;
    const dim3 grid(n_parts, head_groups(a), n_seqs);
    part_sums *parts = (part_sums *)workspace;
    cu_launch_threads(a.kv_type == DE_CU_KV_FP8 ? part_kernel<true> : part_kernel<false>, grid,
                      WARPS * 32, 0, stream, dependent, a, p, ldp, rope, seqs, pages, parts);
    cu_launch_threads(merge_kernel, dim3(a.q_heads, n_seqs), A_D, 0, stream, dependent, a, p, ldp,
                      seqs, (const part_sums *)parts, y);
}
