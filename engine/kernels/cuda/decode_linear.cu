/* decode_linear.cu -- matrices times at most 64 rows: as fast as the weights can be read.
 *
 * A block of 16 warps takes tiles of 16 outputs in turn; its warps share the tile's columns (warp w the 32-column tiles w, w + 16,
 * ...), each lane loading fragments of 16 bytes straight into registers, some 8 to 16 of them before the first is used. Rows of x are
 * the n side of mma.m16n8k16: eight rows cost what one does. x comes from shared memory, where the block prepared it (at most 8
 * rows), or as ready fragments from L2. The warps' sums meet in shared memory and are added in order, so that a row's bits depend
 * neither on the grid nor on the other rows. */
#include "kernels/cuda/decode.cuh"

namespace
{

enum { BF16, F32, ADD, GDN_IN };

struct args {
    de_cu_linear w;
    de_cu_x x;
    uint32_t n, groups; /* rows; scale groups of a row of weights */
    void *y;
    size_t ldy;
    /* GDN_IN */
    de_cu_gdn g;
    const de_cu_seq *seqs;
    float *c;
    de_cu_ahead ahead;
    uint32_t blocks; /* that compute; those behind fetch ahead */
};

/* What an output needs besides its sum, fetched before the sum is there: its scale; the old value; the conv's inputs and weights. */
struct needs {
    float scale, v[8];
};
template <bool SCALED, int STORE>
__device__ __forceinline__ void fetch(const args &a, uint32_t row, uint32_t token, needs &to)
{
    if (row >= a.w.out || token >= a.n)
        return;
    if (SCALED)
        to.scale = a.w.scale[row];
    if (STORE == ADD)
        to.v[0] = ((float *)a.y)[token * a.ldy + row];
    if (STORE == GDN_IN && row < a.g.channels) {
        const uint32_t ch = a.g.channels;
        const float *tail = a.g.state + a.seqs[token].slot * a.g.slot_floats +
                            (size_t)a.g.v_heads * DE_CU_GDN * DE_CU_GDN + row;
#pragma unroll
        for (int i = 0; i < 3; i++)
            to.v[i] = tail[i * ch];
#pragma unroll
        for (int i = 0; i < 4; i++)
            to.v[4 + i] = a.g.conv[i * ch + row];
    }
}
template <int STORE>
__device__ __forceinline__ void store(const args &a, uint32_t row, uint32_t token, float v,
                                      const needs &with)
{
    if (row >= a.w.out || token >= a.n)
        return;
    if (STORE == BF16)
        ((bf16 *)a.y)[token * a.ldy + row] = __float2bfloat16(v);
    else if (STORE == F32)
        ((float *)a.y)[token * a.ldy + row] = v;
    else if (STORE == ADD)
        ((float *)a.y)[token * a.ldy + row] = with.v[0] + v;
    else if (row >= a.g.channels)
        ((bf16 *)a.y)[token * a.ldy + row] = __float2bfloat16(v);
    else {
        const uint32_t ch = a.g.channels;
        float *tail = a.g.state + a.seqs[token].slot * a.g.slot_floats +
                      (size_t)a.g.v_heads * DE_CU_GDN * DE_CU_GDN + row;
        const float u = __bfloat162float(__float2bfloat16(v));
        float s = with.v[4] * with.v[0];
        s = fmaf(with.v[5], with.v[1], s);
        s = fmaf(with.v[6], with.v[2], s);
        s = fmaf(with.v[7], u, s);
        tail[0] = with.v[1];
        tail[ch] = with.v[2];
        tail[2 * ch] = u;
        a.c[(size_t)token * ch + row] = cu_silu(s);
    }
}

/* KT tiles of 32 columns to a warp; D tiles of 16 outputs under way; FUSED: x of kind KIND in shared memory. */
template <bool INT8, bool GROUPS, int STORE, int KIND, int KT, int D, bool FUSED>
__global__ void __launch_bounds__(CU_THREADS, 1) rows_kernel(const args a)
{
    extern __shared__ __align__(16) char shared[];
    constexpr int L = INT8 ? 1 : 2; /* loads a tile */
    const uint32_t blocks = a.blocks;
    if (blockIdx.x >= blocks) {
        cu_fetch_ahead(a.ahead, blockIdx.x - blocks, gridDim.x - blocks);
        cu_wait();
        cu_release();
        return;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t tiles = a.w.in / 32, n_out = (a.w.out + 15) / 16;
    float *sums = (float *)shared; /* two buffers for D tiles */
    bf16 *xs = (bf16 *)(shared + 2 * D * CU_SUMS);
    uint4 v[D][KT][L];
    auto load = [&](uint4 to[KT][L], uint32_t r) {
#pragma unroll
        for (int k = 0; k < KT; k++) {
            const uint32_t c = warp + 16 * k;
            const uint8_t *p =
                a.w.w + ((size_t)r * tiles + c) * (INT8 ? 512 : 1024) + (size_t)lane * 16;
#pragma unroll
            for (int i = 0; i < L; i++)
                to[k][i] = r < n_out && c < tiles ? cu_load(p + i * 512) : make_uint4(0, 0, 0, 0);
        }
    };
#pragma unroll
    for (int d = 0; d < D; d++)
        load(v[d], blockIdx.x + d * blocks);
    if (a.ahead.n == 0)
        cu_release();
    cu_wait();
    if (a.ahead
            .n) /* then what ran before this kernel is over when the next one starts: it may read x before its own wait */
        cu_release();
    if (FUSED)
        cu_prepare<KIND>(a.x, a.n, a.w.in, xs, (float *)shared);
    const size_t ldx = FUSED ? cu_x_stride(a.w.in) : a.w.in;
    const uint32_t mine = threadIdx.x / 128, token8 = threadIdx.x % 128 / 16,
                   o16 = threadIdx.x % 16;
    int buffer = 0;
    for (uint32_t at = blockIdx.x; at < n_out; at += D * blocks)
        for (uint32_t first = 0; first < a.n; first += 8) {
            /* a group of 128 threads stores tile `mine` of the D */
            const uint32_t token = first + token8, r = at + mine * blocks, o = r * 16 + o16;
            float *const to = sums + buffer * D * (CU_SUMS / 4);
            needs with;
            if (mine < D && r < n_out)
                fetch<INT8 && !GROUPS, STORE>(a, o, token, with);
            const uint32_t row = min(first + lane / 4, a.n - 1);
            const bf16 *x = (FUSED ? xs : a.x.ready) + row * ldx + lane % 4 * 8;
#pragma unroll
            for (int d = 0; d < D; d++)
                if (at + d * blocks < n_out) {
                    float acc[4];
                    cu_row_sums<INT8, GROUPS, KT, FUSED>(v[d], x, tiles, a.w.scale, a.groups,
                                                         a.w.group, (at + d * blocks) * 16, acc);
                    if (first + 8 >= a.n)
                        load(v[d], at + (d + D) * blocks);
                    cu_put_sums(to + d * (CU_SUMS / 4), acc);
                }
            __syncthreads();
            if (mine < D && r < n_out && token < a.n) {
                float y = cu_get_sum(to + mine * (CU_SUMS / 4), token8, o16);
                if (INT8 && !GROUPS)
                    y *= with.scale;
                store<STORE>(a, o, token, y, with);
            }
            buffer ^= 1;
        }
}

template <bool INT8, bool GROUPS, int STORE, int KIND, int KT, bool FUSED>
void launch(cudaStream_t stream, const args &a, bool dependent)
{
    constexpr int L = KT * (INT8 ? 1 : 2), D = L >= 16 ? 1 : L >= 8 ? 2 : 3;
    const size_t bytes =
        2 * D * CU_SUMS + (FUSED ? DE_CU_FUSED_ROWS * cu_x_stride(a.w.in) * sizeof(bf16) : 0);
    args b = a;
    b.blocks = cu_blocks((a.w.out + 15) / 16);
    cu_launch(rows_kernel<INT8, GROUPS, STORE, KIND, KT, D, FUSED>,
              dim3(b.blocks + (a.ahead.n ? CU_AHEAD_BLOCKS : 0)), bytes, stream, dependent, b);
}

template <int STORE, int KIND, bool INT8, bool GROUPS, int KT>
void choose_source(cudaStream_t stream, const args &a, bool dependent)
{
    if (a.x.ready)
        launch<INT8, GROUPS, STORE, DE_CU_X_PLAIN, KT, false>(stream, a, dependent);
    else
        launch<INT8, GROUPS, STORE, KIND, KT, true>(stream, a, dependent);
}

template <int STORE, int KIND, bool INT8, bool GROUPS>
void choose_width(cudaStream_t stream, const args &a, bool dependent)
{
    if (a.w.in <= 2048)
        choose_source<STORE, KIND, INT8, GROUPS, 4>(stream, a, dependent);
    else
        choose_source<STORE, KIND, INT8, GROUPS, 8>(stream, a, dependent);
}

template <int STORE, int KIND>
void choose_format(cudaStream_t stream, const args &a, bool dependent)
{
    if (a.w.scale && a.groups > 1)
        choose_width<STORE, KIND, true, true>(stream, a, dependent);
    else if (a.w.scale)
        choose_width<STORE, KIND, true, false>(stream, a, dependent);
    else
        choose_width<STORE, KIND, false, false>(stream, a, dependent);
}

args args_of(const de_cu_linear &w, const de_cu_x &x, uint32_t n, void *y, size_t ldy)
{
    args a = {};
    a.w = w;
    a.x = x;
    a.n = n;
    a.groups = w.scale ? w.in / w.group : 1;
    a.y = y;
    a.ldy = ldy;
    return a;
}

template <int KIND>
__global__ void __launch_bounds__(CU_THREADS, 1)
    prepare_kernel(const de_cu_x x, uint32_t n, uint32_t k, bf16 *to)
{
    extern __shared__ __align__(16) char shared[];
    cu_release();
    cu_wait();
    de_cu_x mine = x;
    mine.f = x.f ? x.f + (size_t)blockIdx.x * k : NULL;
    mine.x = x.x ? x.x + blockIdx.x * x.ldx : NULL;
    cu_prepare<KIND>(mine, 1, k, to + (size_t)blockIdx.x * k, (float *)shared);
}

} // namespace

void de_cu_decode_prepare(cudaStream_t stream, const de_cu_x &x, uint32_t n, uint32_t k, bf16 *to,
                          bool dependent)
{
    auto *kernel = x.kind == DE_CU_X_PLAIN  ? prepare_kernel<DE_CU_X_PLAIN>
                   : x.kind == DE_CU_X_NORM ? prepare_kernel<DE_CU_X_NORM>
                                            : prepare_kernel<DE_CU_X_GATED_NORM>;
    cu_launch(kernel, dim3(n), CU_SUMS, stream, dependent, x, n, k, to);
}

/* Which kinds of x meet which stores is fixed by the model: the combinations that occur are built, no others. */
void de_cu_decode_linear(cudaStream_t stream, const de_cu_linear &w, const de_cu_x &x, uint32_t n,
                         de_cu_store store, void *y, size_t ldy, de_cu_ahead ahead, bool dependent)
{
    args a = args_of(w, x, n, y, ldy);
    a.ahead = ahead;
    if (store == DE_CU_BF16)
        choose_format<BF16, DE_CU_X_NORM>(stream, a, dependent);
    else if (store == DE_CU_F32)
        choose_format<F32, DE_CU_X_NORM>(stream, a, dependent);
    else if (x.kind == DE_CU_X_PLAIN)
        choose_format<ADD, DE_CU_X_PLAIN>(stream, a, dependent);
    else
        choose_format<ADD, DE_CU_X_GATED_NORM>(stream, a, dependent);
}

void de_cu_decode_gdn_in(cudaStream_t stream, const de_cu_linear &w, const de_cu_x &x, uint32_t n,
                         const de_cu_gdn &g, const de_cu_seq *seqs, float *c, bf16 *p, size_t ldp,
                         bool dependent)
{
    args a = args_of(w, x, n, p, ldp);
    a.g = g;
    a.seqs = seqs;
    a.c = c;
    choose_format<GDN_IN, DE_CU_X_NORM>(stream, a, dependent);
}
