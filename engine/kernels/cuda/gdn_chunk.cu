/* gdn_chunk.cu -- the gated delta rule over many rows, by chunks of 64 that end where the position is a multiple of 64.
 *
 * Formulas and letters: engine/model/cpu/layer_gdn.c. With T = (I + A)^-1, W = T (beta exp(G) K) and U = T (beta V):
 *
 *   V' = U - W S;  O = exp(G) (Q S) + P V', P = tril(Q K' exp(G_i - G_j));  S = exp(G_C) S + K' (exp(G_C - G) V')
 *
 * Kernels: conv and norms of all rows; the conv tails; then for RANGE chunks of each sequence at a time: W, U and P of every chunk and
 * head at once, and a walk over the chunks in order, a block for 32 of a head's 128 value columns, S in registers. Last the gated
 * norm. q, k and v are rounded to BF16, as W and P are; S, T and V' go into products as two BF16 (their high and low halves), sums are
 * float. What is computed for a row depends on its sequence and on nothing else; between chunks a state is float, in registers or
 * in its slot, so where a prefill is cut at a multiple of 64 changes no bit. */
#include "kernels/cuda/decode.cuh"

namespace
{

enum { D = DE_CU_GDN, C = 64, SLOTS = 64 /* chunks kept at once, shared by the sequences */ };

/* Chunk c of a sequence: its rows [first, first + n) of the sequence. */
struct span {
    uint32_t first, n;
};
__device__ __forceinline__ uint32_t chunks_of(const de_cu_seq &s)
{
    return (s.start % C + s.n_rows + C - 1) / C;
}
__device__ __forceinline__ span chunk_of(const de_cu_seq &s, uint32_t c)
{
    const uint32_t skip = s.start % C, first = c ? c * C - skip : 0;
    return { first, min((c + 1) * C - skip, s.n_rows) - first };
}

/* What is kept of a chunk and value head between the kernels. */
struct kept {
    float u[C][D];
    bf16 w[C][D], p[C][C];
    float sum[C]; /* G; behind the last row as in it */
};

struct work {
    bf16 *qk, *v;    /* [rows][2 k_heads * 128], normed; [rows][v_heads * 128] */
    float *g, *beta; /* [rows][v_heads] */
    kept *k;         /* [SLOTS or n_seqs][v_heads] */
};

work work_at(const de_cu_gdn &g, uint32_t rows, uint32_t n_seqs, void *workspace, size_t *ret_bytes)
{
    de_cu_room room = { (uint8_t *)workspace, 0 };
    work w;
    w.qk = room.take<bf16>((size_t)rows * 2 * g.k_heads * D);
    w.v = room.take<bf16>((size_t)rows * g.v_heads * D);
    w.g = room.take<float>((size_t)rows * g.v_heads);
    w.beta = room.take<float>((size_t)rows * g.v_heads);
    w.k = room.take<kept>((size_t)(n_seqs > SLOTS ? n_seqs : SLOTS) * g.v_heads);
    *ret_bytes = room.used;
    return w;
}

__device__ __forceinline__ const de_cu_seq &seq_of_row(const de_cu_seq *seqs, uint32_t n_seqs,
                                                       uint32_t row)
{
    uint32_t i = 0;
    while (i + 1 < n_seqs && seqs[i + 1].row <= row)
        i++;
    return seqs[i];
}

/* A warp: 128 channels of a row, a head of q, k or v. */
__global__ void __launch_bounds__(256) conv_kernel(const de_cu_gdn a, const bf16 *p, size_t ldp,
                                                   const de_cu_seq *seqs, uint32_t n_seqs, work w)
{
    const uint32_t row = blockIdx.x, lane = threadIdx.x % 32, K = a.k_heads, V = a.v_heads,
                   ch = a.channels;
    const de_cu_seq s = seq_of_row(seqs, n_seqs, row);
    const float *tail = a.state + s.slot * a.slot_floats + (size_t)V * D * D;
    const uint32_t t = row - s.row; /* of the sequence's rows */
    for (uint32_t head = threadIdx.x / 32; head < 2 * K + V; head += 8) {
        const uint32_t c = head * D + lane * 4;
        float x[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) { /* input t + i - 3 */
            const float4 f = *(const float4 *)(a.conv + (size_t)i * ch + c);
            float4 in;
            if (t + i >= 3) {
                const uint2 v = *(const uint2 *)(p + (size_t)(row + i - 3) * ldp + c);
                in = make_float4(cu_lo(v.x), cu_hi(v.x), cu_lo(v.y), cu_hi(v.y));
            } else {
                in = *(const float4 *)(tail + (size_t)(t + i) * ch + c);
            }
            x[0] = fmaf(f.x, in.x, x[0]), x[1] = fmaf(f.y, in.y, x[1]);
            x[2] = fmaf(f.z, in.z, x[2]), x[3] = fmaf(f.w, in.w, x[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = cu_silu(x[i]);
        bf16 *to = w.v + ((size_t)row * V + head - 2 * K) * D + lane * 4;
        if (head < 2 * K) {
            const float n =
                rsqrtf(cu_sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]) + 1e-6f);
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[i] *= head < K ? n * 0.08838834764831845f : n;
            to = w.qk + ((size_t)row * 2 * K + head) * D + lane * 4;
        }
        *(uint2 *)to = make_uint2(cu_pack(x[0], x[1]), cu_pack(x[2], x[3]));
    }
    const bf16 *b = p + row * ldp + ch + (size_t)V * D;
    for (uint32_t h = threadIdx.x; h < V; h += 256) {
        w.beta[(size_t)row * V + h] = 1.0f / (1.0f + expf(-__bfloat162float(b[h])));
        w.g[(size_t)row * V + h] =
            a.neg_exp_A[h] * cu_softplus(__bfloat162float(b[V + h]) + a.dt_bias[h]);
    }
}

__global__ void tail_kernel(const de_cu_gdn a, const bf16 *p, size_t ldp, const de_cu_seq *seqs)
{
    const de_cu_seq s = seqs[blockIdx.y];
    const uint32_t c = blockIdx.x * blockDim.x + threadIdx.x, ch = a.channels;
    if (c >= ch)
        return;
    float *tail = a.state + s.slot * a.slot_floats + (size_t)a.v_heads * D * D + c;
    float now[3];
#pragma unroll
    for (uint32_t i = 0; i < 3; i++) {
        const uint32_t at = s.n_rows + i; /* in tail followed by the rows */
        now[i] = at >= 3 ? __bfloat162float(p[(size_t)(s.row + at - 3) * ldp + c]) : tail[at * ch];
    }
#pragma unroll
    for (int i = 0; i < 3; i++)
        tail[i * ch] = now[i];
}

/* ---- matrices in shared memory: rows of `size` bytes, 16-byte pieces exchanged so that eight rows meet eight places */

__device__ __forceinline__ uint32_t at16(uint32_t row, uint32_t piece, uint32_t size)
{
    /* rows of 64 bytes: two to a line of 128 */
    return size == 64 ? row * 64 + (piece ^ row / 2 % 4) * 16 : row * size + (piece ^ row % 8) * 16;
}
/* A fragment (16 rows x 16 columns) at (row, column) of a row-major matrix. */
__device__ __forceinline__ void load_a(uint32_t f[4], const char *m, uint32_t size, uint32_t row,
                                       uint32_t column)
{
    const uint32_t lane = threadIdx.x % 32;
    cu_ldmatrix(f, m + at16(row + lane % 16, column / 8 + lane / 16, size));
}
/* The same of the transpose: m is [columns][rows]. */
__device__ __forceinline__ void load_a_transposed(uint32_t f[4], const char *m, uint32_t size,
                                                  uint32_t row, uint32_t column)
{
    const uint32_t lane = threadIdx.x % 32;
    cu_ldmatrix_transposed(
        f, m + at16(column + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2, size));
}
/* Two B fragments (16 of k x 8), k from `k` on, columns n .. n + 15, of m [k][n]. f[0], f[1]; f[2], f[3]. */
__device__ __forceinline__ void load_b(uint32_t f[4], const char *m, uint32_t size, uint32_t k,
                                       uint32_t n)
{
    const uint32_t lane = threadIdx.x % 32;
    cu_ldmatrix_transposed(f, m + at16(k + lane % 16, n / 8 + lane / 16, size));
}
/* The same of m [n][k]. */
__device__ __forceinline__ void load_b_rows(uint32_t f[4], const char *m, uint32_t size, uint32_t k,
                                            uint32_t n)
{
    const uint32_t lane = threadIdx.x % 32;
    cu_ldmatrix(f, m + at16(n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2, size));
}
/* Two neighbours as high and low halves: their sum is the float to 16 bits. */
__device__ __forceinline__ void split(float a, float b, uint32_t &high, uint32_t &low)
{
    high = cu_pack(a, b);
    low = cu_pack(a - cu_lo(high), b - cu_hi(high));
}
__device__ __forceinline__ void put2(char *m, uint32_t size, uint32_t row, uint32_t column,
                                     uint32_t v)
{
    *(uint32_t *)(m + at16(row, column / 8, size) + column % 8 * 2) = v;
}

/* ---- W, U and P of a chunk and value head */

struct chunk_memory {
    char q[C * D * 2], k[C * D * 2], v[C * D * 2];
    char tw[2][C * C * 2], tu[2][C * C * 2]; /* high, low */
    float a[C][C + 4];
    float sum[C], beta[C];
};

__global__ void __launch_bounds__(128)
    chunk_kernel(const de_cu_gdn a, const de_cu_seq *seqs, uint32_t c0, uint32_t range, work w)
{
    extern __shared__ __align__(128) char shared[];
    chunk_memory &m = *(chunk_memory *)shared;
    const uint32_t head = blockIdx.y, seq = blockIdx.z, c = c0 + blockIdx.x, V = a.v_heads,
                   K = a.k_heads, kh = head / (V / K), warp = threadIdx.x / 32,
                   lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const de_cu_seq s = seqs[seq];
    if (c >= chunks_of(s))
        return;
    const span r = chunk_of(s, c);
    const uint32_t row0 = s.row + r.first;
    kept &to = w.k[((size_t)seq * range + blockIdx.x) * V + head];
    for (uint32_t i = threadIdx.x; i < C * 16; i += 128) {
        const uint32_t row = i / 16, piece = i % 16;
        const bool has = row < r.n;
        const bf16 *from = w.qk + (size_t)(row0 + (has ? row : 0)) * 2 * K * D + piece * 8;
        cu_copy16(m.q + at16(row, piece, D * 2), from + kh * D, has);
        cu_copy16(m.k + at16(row, piece, D * 2), from + (K + kh) * D, has);
        cu_copy16(m.v + at16(row, piece, D * 2),
                  w.v + ((size_t)(row0 + (has ? row : 0)) * V + head) * D + piece * 8, has);
    }
    cu_copies_commit();
    if (warp == 0) { /* sums of g, rising */
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = lane * 2 + i;
            x[i] = row < r.n ? w.g[(size_t)(row0 + row) * V + head] : 0;
            m.beta[row] = row < r.n ? w.beta[(size_t)(row0 + row) * V + head] : 0;
        }
        x[1] += x[0];
        const float before = cu_rising_sum(x[1]) - x[1];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m.sum[lane * 2 + i] = before + x[i];
            to.sum[lane * 2 + i] = before + x[i];
        }
    }
    cu_copies_wait<0>();
    __syncthreads();
    /* a warp: 16 rows of K K' and Q K' */
    const uint32_t i0 = warp * 16;
    float kk[C / 8][4] = {}, qk[C / 8][4] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        uint32_t fk[4], fq[4];
        load_a(fk, m.k, D * 2, i0, d);
        load_a(fq, m.q, D * 2, i0, d);
#pragma unroll
        for (int j = 0; j < C / 8; j += 2) {
            uint32_t b[4];
            load_b_rows(b, m.k, D * 2, d, j * 8);
            cu_mma2(&kk[j], fk, b);
            cu_mma2(&qk[j], fq, b);
        }
    }
#pragma unroll
    for (int j = 0; j < C / 8; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t i = i0 + g + 8 * h, at = j * 8 + 2 * t;
            float p[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float decay = at + e <= i ? expf(m.sum[i] - m.sum[at + e]) : 0;
                p[e] = qk[j][2 * h + e] * decay;
                m.a[i][at + e] = at + e < i ? m.beta[i] * kk[j][2 * h + e] * decay : 0;
            }
            *(uint32_t *)&to.p[i][at] = cu_pack(p[0], p[1]);
        }
    __syncthreads();
    /* a thread: a column of T by forward substitution */
    if (threadIdx.x < C) {
        const uint32_t j = threadIdx.x;
        float x[C];
#pragma unroll
        for (int i = 0; i < C; i++) {
            float v = i == (int)j ? 1.0f : 0.0f, v1 = 0;
#pragma unroll
            for (int k = 0; k < i; k += 4) {
                const float4 f = *(const float4 *)&m.a[i][k]; /* zeros from i on */
                v = fmaf(-f.x, x[k], v);
                if (k + 1 < i)
                    v1 = fmaf(-f.y, x[k + 1], v1);
                if (k + 2 < i)
                    v = fmaf(-f.z, x[k + 2], v);
                if (k + 3 < i)
                    v1 = fmaf(-f.w, x[k + 3], v1);
            }
            x[i] = v + v1;
        }
        const float beta = m.beta[j], e = beta * expf(m.sum[j]);
#pragma unroll
        for (int i = 0; i < C; i++) {
            const uint32_t at = at16(i, j / 8, C * 2) + j % 8 * 2;
            const float u = x[i] * beta, v = x[i] * e;
            const bf16 hu = __float2bfloat16(u), hv = __float2bfloat16(v);
            *(bf16 *)(m.tu[0] + at) = hu;
            *(bf16 *)(m.tu[1] + at) = __float2bfloat16(u - __bfloat162float(hu));
            *(bf16 *)(m.tw[0] + at) = hv;
            *(bf16 *)(m.tw[1] + at) = __float2bfloat16(v - __bfloat162float(hv));
        }
    }
    __syncthreads();
#pragma unroll
    for (int which = 0; which < 2; which++) {
        float acc[D / 8][4] = {};
        const char *right = which ? m.v : m.k;
#pragma unroll
        for (int k = 0; k < C; k += 16) {
            uint32_t high[4], low[4];
            load_a(high, which ? m.tu[0] : m.tw[0], C * 2, i0, k);
            load_a(low, which ? m.tu[1] : m.tw[1], C * 2, i0, k);
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                uint32_t b[4];
                load_b(b, right, D * 2, k, n * 8);
                cu_mma2(&acc[n], high, b);
                cu_mma2(&acc[n], low, b);
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t i = i0 + g + 8 * h, at = n * 8 + 2 * t;
                if (which)
                    *(float2 *)&to.u[i][at] = make_float2(acc[n][2 * h], acc[n][2 * h + 1]);
                else
                    *(uint32_t *)&to.w[i][at] = cu_pack(acc[n][2 * h], acc[n][2 * h + 1]);
            }
    }
}

/* ---- the walk */

enum { COLUMNS = 32, N = COLUMNS / 8 };

struct stage {
    char w[C * D * 2], q[C * D * 2], k[C * D * 2], p[C * C * 2];
    float u[C][COLUMNS], sum[C];
};
struct walk_memory {
    stage in[2];
    char s[2][D * COLUMNS * 2];    /* [key dim][column], high and low */
    char v[2][2][C * COLUMNS * 2]; /* V', and V' faded to the chunk's end */
};

__global__ void __launch_bounds__(128, 1) walk_kernel(const de_cu_gdn a, const de_cu_seq *seqs,
                                                      uint32_t c0, uint32_t range, work w, bf16 *y)
{
    extern __shared__ __align__(128) char shared[];
    walk_memory &m = *(walk_memory *)shared;
    const uint32_t column0 = blockIdx.x * COLUMNS, head = blockIdx.y, seq = blockIdx.z,
                   V = a.v_heads, K = a.k_heads, kh = head / (V / K), warp = threadIdx.x / 32,
                   lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const de_cu_seq sq = seqs[seq];
    const uint32_t all = chunks_of(sq);
    if (c0 >= all)
        return;
    const uint32_t n_chunks = min(range, all - c0);
    auto fetch = [&](uint32_t i) {
        if (i < n_chunks) {
            stage &to = m.in[i % 2];
            const span r = chunk_of(sq, c0 + i);
            const kept &from = w.k[((size_t)seq * range + i) * V + head];
            for (uint32_t x = threadIdx.x; x < C * 16; x += 128) {
                const uint32_t row = x / 16, piece = x % 16;
                const bool has = row < r.n;
                const bf16 *qk =
                    w.qk + (size_t)(sq.row + r.first + (has ? row : 0)) * 2 * K * D + piece * 8;
                cu_copy16(to.q + at16(row, piece, D * 2), qk + kh * D, has);
                cu_copy16(to.k + at16(row, piece, D * 2), qk + (K + kh) * D, has);
                cu_copy16(to.w + at16(row, piece, D * 2), &from.w[row][piece * 8]);
            }
            for (uint32_t x = threadIdx.x; x < C * 8; x += 128) {
                cu_copy16(to.p + at16(x / 8, x % 8, C * 2), &from.p[x / 8][x % 8 * 8]);
                cu_copy16(&to.u[x / 8][x % 8 * 4], &from.u[x / 8][column0 + x % 8 * 4]);
            }
            if (threadIdx.x < C / 4)
                cu_copy16(&to.sum[threadIdx.x * 4], &from.sum[threadIdx.x * 4]);
        }
        cu_copies_commit();
    };
    fetch(0);
    /* a warp has 32 key dims of S */
    float *S = a.state + sq.slot * a.slot_floats + (size_t)head * D * D + column0;
    float s[2][N][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float2 v =
                    *(const float2 *)(S + (size_t)(warp * 32 + i * 16 + g + 8 * h) * D + n * 8 +
                                      2 * t);
                s[i][n][2 * h] = v.x;
                s[i][n][2 * h + 1] = v.y;
            }
    for (uint32_t i = 0; i < n_chunks; i++) {
        fetch(i + 1);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint32_t high, low;
                    split(s[j][n][2 * h], s[j][n][2 * h + 1], high, low);
                    put2(m.s[0], COLUMNS * 2, warp * 32 + j * 16 + g + 8 * h, n * 8 + 2 * t, high);
                    put2(m.s[1], COLUMNS * 2, warp * 32 + j * 16 + g + 8 * h, n * 8 + 2 * t, low);
                }
        cu_copies_wait<1>();
        __syncthreads();
        const stage &in = m.in[i % 2];
        const uint32_t i0 = warp * 16;
        float ws[N][4] = {}, o[N][4] = {};
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            uint32_t fw[4], fq[4];
            load_a(fw, in.w, D * 2, i0, k);
            load_a(fq, in.q, D * 2, i0, k);
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int n = 0; n < N; n += 2) {
                    uint32_t b[4];
                    load_b(b, m.s[part], COLUMNS * 2, k, n * 8);
                    cu_mma2(&ws[n], fw, b);
                    cu_mma2(&o[n], fq, b);
                }
        }
        const float end = in.sum[C - 1], fade_all = expf(end);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t row = i0 + g + 8 * h;
            const float fade = expf(end - in.sum[row]), grow = expf(in.sum[row]);
#pragma unroll
            for (int n = 0; n < N; n++) {
                const float2 u = *(const float2 *)&in.u[row][n * 8 + 2 * t];
                const float v0 = u.x - ws[n][2 * h], v1 = u.y - ws[n][2 * h + 1];
                uint32_t high, low;
                split(v0, v1, high, low);
                put2(m.v[0][0], COLUMNS * 2, row, n * 8 + 2 * t, high);
                put2(m.v[0][1], COLUMNS * 2, row, n * 8 + 2 * t, low);
                split(v0 * fade, v1 * fade, high, low);
                put2(m.v[1][0], COLUMNS * 2, row, n * 8 + 2 * t, high);
                put2(m.v[1][1], COLUMNS * 2, row, n * 8 + 2 * t, low);
                o[n][2 * h] *= grow;
                o[n][2 * h + 1] *= grow;
            }
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < C; k += 16) {
            uint32_t fp[4];
            load_a(fp, in.p, C * 2, i0, k);
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int n = 0; n < N; n += 2) {
                    uint32_t b[4];
                    load_b(b, m.v[0][part], COLUMNS * 2, k, n * 8);
                    cu_mma2(&o[n], fp, b);
                }
        }
        const span r = chunk_of(sq, c0 + i);
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (i0 + g + 8 * h < r.n)
#pragma unroll
                for (int n = 0; n < N; n++)
                    *(uint32_t *)(y + ((size_t)(sq.row + r.first + i0 + g + 8 * h) * V + head) * D +
                                  column0 + n * 8 + 2 * t) = cu_pack(o[n][2 * h], o[n][2 * h + 1]);
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[j][n][e] *= fade_all;
#pragma unroll
            for (int k = 0; k < C; k += 16) {
                uint32_t fk[4];
                load_a_transposed(fk, in.k, D * 2, warp * 32 + j * 16, k);
#pragma unroll
                for (int part = 0; part < 2; part++)
#pragma unroll
                    for (int n = 0; n < N; n += 2) {
                        uint32_t b[4];
                        load_b(b, m.v[1][part], COLUMNS * 2, k, n * 8);
                        cu_mma2(&s[j][n], fk, b);
                    }
            }
        }
        __syncthreads(); /* m.s, m.v and this stage are read */
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                *(float2 *)(S + (size_t)(warp * 32 + i * 16 + g + 8 * h) * D + n * 8 + 2 * t) =
                    make_float2(s[i][n][2 * h], s[i][n][2 * h + 1]);
}

/* y = norm(y) silu(z), by a warp for each row and head. */
__global__ void __launch_bounds__(256)
    gate_kernel(const de_cu_gdn a, const bf16 *p, size_t ldp, uint32_t rows, bf16 *y)
{
    const uint32_t at = blockIdx.x * 8 + threadIdx.x / 32, row = at / a.v_heads,
                   head = at % a.v_heads, lane = threadIdx.x % 32;
    if (row >= rows)
        return;
    bf16 *to = y + ((size_t)row * a.v_heads + head) * D + lane * 4;
    const uint2 v = *(const uint2 *)to,
                z = *(const uint2 *)(p + row * ldp + a.channels + (size_t)head * D + lane * 4);
    const float4 w = *(const float4 *)(a.norm + lane * 4);
    const float x[4] = { cu_lo(v.x), cu_hi(v.x), cu_lo(v.y), cu_hi(v.y) };
    const float s =
        rsqrtf(cu_sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]) / D + a.eps);
    *(uint2 *)to = make_uint2(
        cu_pack(x[0] * s * w.x * cu_silu(cu_lo(z.x)), x[1] * s * w.y * cu_silu(cu_hi(z.x))),
        cu_pack(x[2] * s * w.z * cu_silu(cu_lo(z.y)), x[3] * s * w.w * cu_silu(cu_hi(z.y))));
}

} // namespace

size_t de_cu_gdn_chunk_bytes(const de_cu_gdn &g, uint32_t rows, uint32_t n_seqs)
{
    size_t bytes;
    (void)work_at(g, rows, n_seqs, NULL, &bytes);
    return bytes;
}

void de_cu_gdn_chunk(cudaStream_t stream, const de_cu_gdn &g, const bf16 *p, size_t ldp,
                     const de_cu_seq *seqs, uint32_t n_seqs, uint32_t rows, uint32_t max_rows,
                     bf16 *y, void *workspace)
{
    size_t bytes;
    const work w = work_at(g, rows, n_seqs, workspace, &bytes);
    conv_kernel<<<rows, 256, 0, stream>>>(g, p, ldp, seqs, n_seqs, w);
    tail_kernel<<<dim3((g.channels + 255) / 256, n_seqs), 256, 0, stream>>>(g, p, ldp, seqs);
    const uint32_t most = (max_rows + C - 1) / C + 1; /* chunks of a sequence */
    uint32_t range = n_seqs < SLOTS ? SLOTS / n_seqs : 1;
    range = range < most ? range : most;
    for (uint32_t c0 = 0; c0 < most; c0 += range) {
        cu_launch_threads(chunk_kernel, dim3(range, g.v_heads, n_seqs), 128, sizeof(chunk_memory),
                          stream, false, g, seqs, c0, range, w);
        cu_launch_threads(walk_kernel, dim3(D / COLUMNS, g.v_heads, n_seqs), 128,
                          sizeof(walk_memory), stream, false, g, seqs, c0, range, w, y);
    }
    gate_kernel<<<(rows * g.v_heads + 7) / 8, 256, 0, stream>>>(g, p, ldp, rows, y);
}
