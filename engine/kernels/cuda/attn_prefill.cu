/* attn_prefill.cu -- causal attention of many rows over paged keys and values.
 *
 * First every row's queries are normed, turned and kept, its key and value go to their page. Then a block has 128 (row, query head)
 * pairs of one KV head, neighbours in the sequence with all heads of the KV head, and goes over the pages with a running maximum;
 * a warp has 16 of the pairs. Pages come by cp.async, two deep.
 *
 * Fragments are read 16 bytes a lane along the summed index. That permutes the index inside a block of 32 (BF16) or 64 (e4m3), which
 * both operands agree on: for the scores, dims of q and K; for the output, tokens: lane t of the probabilities has tokens
 * t * LANE + 2 j and + 1 from score tile j, so tile j takes its tokens from those places. */
#include "kernels/cuda/attn.cuh"

namespace
{

enum { ROWS = 128, WARPS = 8, THREADS = WARPS * 32 };

template <bool FP8> struct shape {
    static constexpr int PAGE = A_P * A_D * kv_format<FP8>::SIZE; /* bytes of K or V of a page */
    static constexpr int SHARED = ROWS * A_D * 2 + 4 * PAGE;
};

template <bool FP8>
__global__ void __launch_bounds__(256)
    rows_kernel(const de_cu_attn a, const bf16 *p, size_t ldp, const float *rope,
                const de_cu_seq *seqs, const uint32_t *pages, uint32_t n_seqs, uint32_t rows,
                uint16_t *q)
{
    __shared__ float swap[8][A_D];
    const uint32_t heads = a.q_heads + a.kv_heads, at = blockIdx.x * 8 + threadIdx.x / 32,
                   row = at / heads, head = at % heads, lane = threadIdx.x % 32;
    if (row >= rows)
        return;
    p += row * ldp;
    rope += (size_t)row * a.rotary;
    if (head < a.q_heads) {
        float v[8];
        /* 1/16 and the base of exp2 */
        head_values(p + (size_t)head * 2 * A_D, a.q_norm, a.eps, rope, a.rotary,
                    0.0625f * 1.4426950408889634f, swap[threadIdx.x / 32], v);
#pragma unroll
        for (int i = 0; i < 8; i++)
            q[((size_t)row * a.q_heads + head) * A_D + i * 32 + lane] = kv_format<FP8>::one(v[i]);
        return;
    }
    uint32_t seq = 0;
    while (seq + 1 < n_seqs && seqs[seq + 1].row <= row)
        seq++;
    const uint32_t position = seqs[seq].start + row - seqs[seq].row;
    put_kv<FP8>(a, p, rope, head - a.q_heads, pages[seqs[seq].page0 + position / A_P],
                position % A_P, swap[threadIdx.x / 32]);
}

/* Byte offset of 16-byte piece c of a row of `size` bytes; neighbouring rows meet other banks. */
__device__ __forceinline__ uint32_t piece_at(uint32_t row, uint32_t c, uint32_t size)
{
    return row * size + (size > 64 ? c ^ row % 2 * 4 : c) * 16;
}

template <bool FP8>
__global__ void __launch_bounds__(THREADS, 1)
    attend_kernel(const de_cu_attn a, const bf16 *p, size_t ldp, const de_cu_seq *seqs,
                  const uint32_t *pages, const uint16_t *q, bf16 *y)
{
    typedef kv_format<FP8> F;
    constexpr int L = F::LANE, STEPS = L / 4, PAGE = shape<FP8>::PAGE, KROW = A_D * F::SIZE,
                  VROW = A_P * F::SIZE;
    extern __shared__ __align__(128) char shared[];
    char *const qs = shared, *const kv = shared + ROWS * A_D * 2;
    const de_cu_seq s = seqs[blockIdx.z];
    const uint32_t per = a.q_heads / a.kv_heads, tokens = ROWS / per, head0 = blockIdx.y * per;
    const uint32_t tile = gridDim.x - 1 - blockIdx.x, first = tile * tokens; /* longest first */
    if (first >= s.n_rows)
        return;
    const uint32_t n_tokens = min(tokens, s.n_rows - first), end = s.start + first + n_tokens,
                   n_pages = (end + A_P - 1) / A_P;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    pages += s.page0;
    auto fetch = [&](uint32_t page) {
        if (page < n_pages) {
            const uint8_t *from = a.kv + pages[page] * a.page_bytes + (size_t)blockIdx.y * 2 * PAGE;
            char *to = kv + page % 2 * 2 * PAGE;
#pragma unroll
            for (int i = 0; i < PAGE / (16 * THREADS); i++) {
                const uint32_t c = i * THREADS + threadIdx.x;
                cu_copy16(to + piece_at(c / (KROW / 16), c % (KROW / 16), KROW), from + c * 16);
                cu_copy16(to + PAGE + piece_at(c / (VROW / 16), c % (VROW / 16), VROW),
                          from + PAGE + c * 16);
            }
        }
        cu_copies_commit();
    };
    for (uint32_t c = threadIdx.x; c < ROWS * (A_D * 2 / 16); c += THREADS) {
        const uint32_t r = c / (A_D * 2 / 16), piece = c % (A_D * 2 / 16);
        const bool has = r < n_tokens * per;
        cu_copy16(
            qs + piece_at(r, piece, A_D * 2),
            has ? q + ((size_t)(s.row + first + r / per) * a.q_heads + head0 + r % per) * A_D +
                      piece * 8
                : q,
            has);
    }
    fetch(0);
    float o[A_D / 8][4] = {}, max[2] = { -INFINITY, -INFINITY }, sum[2] = { 0, 0 };
    const uint32_t r0 = warp * 16 + g;
    const uint32_t pos[2] = { s.start + first + r0 / per, s.start + first + (r0 + 8) / per };
    for (uint32_t page = 0; page < n_pages; page++) {
        fetch(page + 1);
        cu_copies_wait<1>();
        __syncthreads();
        const char *k = kv + page % 2 * 2 * PAGE, *v = k + PAGE;
        float sc[A_P / 8][4] = {};
#pragma unroll
        for (int c = 0; c < A_D / (4 * L); c++) {
            uint32_t lo[L / 2], hi[L / 2];
#pragma unroll
            for (int j = 0; j < L / 8; j++) {
                const uint32_t piece = (c * 4 + t) * (L / 8) + j;
                *(uint4 *)&lo[4 * j] = *(const uint4 *)(qs + piece_at(r0, piece, A_D * 2));
                *(uint4 *)&hi[4 * j] = *(const uint4 *)(qs + piece_at(r0 + 8, piece, A_D * 2));
            }
#pragma unroll
            for (int j = 0; j < A_P / 8; j++) {
                /* tile j of a block of 4 L tokens: n takes token (n / 2) L + 2 (j % (L / 2)) + n % 2 */
                const uint32_t row = j / (L / 2) * 4 * L + g / 2 * L + j % (L / 2) * 2 + g % 2;
                uint32_t b[L / 2];
                F::widen(*(const uint4 *)(k + piece_at(row, c * 4 + t, KROW)), b);
#pragma unroll
                for (int e = 0; e < STEPS; e++) {
                    const uint32_t x[4] = { lo[2 * e], hi[2 * e], lo[2 * e + 1], hi[2 * e + 1] };
                    F::mma(sc[j], x, b[2 * e], b[2 * e + 1]);
                }
            }
        }
        if (page * A_P + A_P > s.start + first) /* not all rows see all of it */
#pragma unroll
            for (int j = 0; j < A_P / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const uint32_t token =
                        page * A_P + j / (L / 2) * 4 * L + t * L + j % (L / 2) * 2 + e % 2;
                    if (token > pos[e / 2])
                        sc[j][e] = -INFINITY;
                }
        float fade[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = max[r];
#pragma unroll
            for (int j = 0; j < A_P / 8; j++)
                top = fmaxf(top, fmaxf(sc[j][2 * r], sc[j][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            fade[r] = exp2f(max[r] - top); /* page 0 has something for every row: top is finite */
            max[r] = top;
            sum[r] *= fade[r];
#pragma unroll
            for (int j = 0; j < A_P / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    sc[j][2 * r + e] = exp2f(sc[j][2 * r + e] - top);
                    sum[r] += sc[j][2 * r + e];
                }
        }
#pragma unroll
        for (int i = 0; i < A_D / 8; i++) {
            o[i][0] *= fade[0], o[i][1] *= fade[0];
            o[i][2] *= fade[1], o[i][3] *= fade[1];
        }
#pragma unroll
        for (int c = 0; c < A_P / (4 * L); c++) {
            uint32_t x[STEPS][4];
#pragma unroll
            for (int e = 0; e < STEPS; e++) {
                const int j = c * (L / 2) + 2 * e;
                x[e][0] = F::pair(sc[j][0], sc[j][1]);
                x[e][1] = F::pair(sc[j][2], sc[j][3]);
                x[e][2] = F::pair(sc[j + 1][0], sc[j + 1][1]);
                x[e][3] = F::pair(sc[j + 1][2], sc[j + 1][3]);
            }
#pragma unroll
            for (int i = 0; i < A_D / 8; i++) {
                uint32_t b[L / 2];
                F::widen(*(const uint4 *)(v + piece_at(i * 8 + g, c * 4 + t, VROW)), b);
#pragma unroll
                for (int e = 0; e < STEPS; e++)
                    F::mma(o[i], x[e], b[2 * e], b[2 * e + 1]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        const uint32_t at = r0 + 8 * r;
        if (at >= n_tokens * per)
            continue;
        const size_t row = s.row + first + at / per;
        const uint32_t head = head0 + at % per;
        const bf16 *gate = p + row * ldp + ((size_t)head * 2 + 1) * A_D;
        bf16 *to = y + (row * a.q_heads + head) * A_D;
        const float one = 1 / sum[r];
#pragma unroll
        for (int i = 0; i < A_D / 8; i++) {
            const uint32_t d = i * 8 + 2 * t, z = *(const uint32_t *)(gate + d);
            *(uint32_t *)(to + d) = cu_pack(o[i][2 * r] * one * cu_sigmoid(cu_lo(z)),
                                            o[i][2 * r + 1] * one * cu_sigmoid(cu_hi(z)));
        }
    }
}

template <bool FP8>
void launch(cudaStream_t stream, const de_cu_attn &a, const bf16 *p, size_t ldp, const float *rope,
            const de_cu_seq *seqs, const uint32_t *pages, uint32_t n_seqs, uint32_t rows,
            uint32_t max_rows, bf16 *y, uint16_t *q)
{
    const uint32_t work = rows * (a.q_heads + a.kv_heads), tokens = ROWS / (a.q_heads / a.kv_heads);
    rows_kernel<FP8>
        <<<(work + 7) / 8, 256, 0, stream>>>(a, p, ldp, rope, seqs, pages, n_seqs, rows, q);
    const dim3 grid((max_rows + tokens - 1) / tokens, a.kv_heads, n_seqs);
    cu_launch_threads(attend_kernel<FP8>, grid, THREADS, shape<FP8>::SHARED, stream, false, a, p,
                      ldp, seqs, pages, (const uint16_t *)q, y);
}

} // namespace

size_t de_cu_attn_prefill_bytes(const de_cu_attn &a, uint32_t rows)
{
    return (size_t)rows * a.q_heads * A_D * sizeof(uint16_t);
}

void de_cu_attn_prefill(cudaStream_t stream, const de_cu_attn &a, const bf16 *p, size_t ldp,
                        const float *rope, const de_cu_seq *seqs, const uint32_t *pages,
                        uint32_t n_seqs, uint32_t rows, uint32_t max_rows, bf16 *y, void *workspace)
{
    if (a.kv_type == DE_CU_KV_FP8)
        launch<true>(stream, a, p, ldp, rope, seqs, pages, n_seqs, rows, max_rows, y,
                     (uint16_t *)workspace);
    else
        launch<false>(stream, a, p, ldp, rope, seqs, pages, n_seqs, rows, max_rows, y,
                      (uint16_t *)workspace);
}
