/* moe_tile.cu -- the experts of many rows: rows are listed by expert, each expert's matrices are multiplied with its rows, and a row's
 * parts are added in rising expert, the shared one last.
 *
 * A pair is a row and one of its choices: row * top_k + choice. Activations and outputs are kept by pair, the shared expert's behind
 * them (rows * top_k + row), so that nothing is moved when lists are made. */
#include "kernels/cuda/tile.cuh"
#include "kernels/cuda/top_k.cuh"

namespace
{

enum { SLICE = 8192 }; /* rows at a time: what is kept by pair bounds it */

struct entry {
    uint32_t expert, first, n; /* pairs [first, first + n) of the expert's list */
};

struct tables {
    uint32_t *id;    /* [rows * top_k] expert of a pair; a row's choices in rising expert */
    float *weight;   /* [rows * top_k], then [rows] of the shared expert */
    uint32_t *count; /* [n_experts] */
    uint32_t *list;  /* [n_experts][rows] pairs in rising row */
    uint32_t *n_entries;
    entry *entries;
    bf16 *act;  /* [rows * (top_k + 1)][act_width] */
    float *out; /* [rows * (top_k + 1)][hidden] */
    uint32_t act_width, max_entries;
};

uint32_t entries_max(const de_cu_experts &e, uint32_t rows, uint32_t bn)
{
    const uint32_t pairs = rows * e.top_k, touched = pairs < e.n_experts ? pairs : e.n_experts;
    return touched + pairs / bn;
}

tables tables_at(const de_cu_experts &e, uint32_t rows, void *workspace, size_t *ret_bytes)
{
    de_cu_room room = { (uint8_t *)workspace, 0 };
    tables t;
    const size_t pairs = (size_t)rows * e.top_k;
    t.act_width = e.width > e.shared_width ? e.width : e.shared_width;
    t.max_entries = entries_max(e, rows, tile_small::BN);
    t.id = room.take<uint32_t>(pairs);
    t.weight = room.take<float>((pairs + rows));
    t.count = room.take<uint32_t>(e.n_experts);
    t.list = room.take<uint32_t>((size_t)e.n_experts * rows);
    t.n_entries = room.take<uint32_t>(1);
    t.entries = room.take<entry>(t.max_entries);
    t.act = room.take<bf16>((pairs + rows) * t.act_width);
    t.out = room.take<float>((pairs + rows) * e.hidden);
    *ret_bytes = room.used;
    return t;
}

template <int PER>
__global__ void __launch_bounds__(256)
    route_kernel(const float *router, size_t ldr, uint32_t E, uint32_t k, uint32_t rows, tables t)
{
    const uint32_t row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows)
        return;
    uint32_t id = 0, rank = 0;
    float w = 0;
    const float *logits = router + row * ldr;
    cu_top_k<PER>(logits, E, k, id, w);
    for (uint32_t j = 0; j < k; j++)
        rank += __shfl_sync(~0u, id, j) < id;
    if (lane < k) {
        t.id[row * k + rank] = id;
        t.weight[row * k + rank] = w;
    }
    if (lane == 0)
        t.weight[rows * k + row] = 1.0f / (1.0f + expf(-logits[E]));
}

/* A block lists the pairs of its expert, in order. */
__global__ void __launch_bounds__(256) list_kernel(uint32_t pairs, uint32_t rows, tables t)
{
    __shared__ uint32_t of_warp[8], base;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t *to = t.list + (size_t)blockIdx.x * rows;
    if (threadIdx.x == 0)
        base = 0;
    __syncthreads();
    for (uint32_t i0 = 0; i0 < pairs; i0 += 1024) { /* thread: four neighbours */
        const uint32_t i = i0 + threadIdx.x * 4;
        uint32_t mine = 0;
#pragma unroll
        for (int j = 0; j < 4; j++)
            mine |= i + j < pairs && t.id[i + j] == blockIdx.x ? 1u << j : 0;
        const uint32_t before = cu_rising_sum((uint32_t)__popc(mine));
        if (lane == 31)
            of_warp[warp] = before;
        __syncthreads();
        uint32_t at = base + before - __popc(mine), all = 0;
#pragma unroll
        for (uint32_t w = 0; w < 8; w++) {
            at += w < warp ? of_warp[w] : 0;
            all += of_warp[w];
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (mine >> j & 1)
                to[at++] = i + j;
        __syncthreads();
        if (threadIdx.x == 0)
            base += all;
        __syncthreads();
    }
    if (threadIdx.x == 0)
        t.count[blockIdx.x] = base;
}

/* One block: the experts' lists in pieces of bn. */
__global__ void __launch_bounds__(1024) entries_kernel(uint32_t E, uint32_t bn, tables t)
{
    __shared__ uint32_t of_warp[32];
    const uint32_t e = threadIdx.x, lane = e % 32, n = e < E ? t.count[e] : 0,
                   mine = (n + bn - 1) / bn;
    uint32_t at = cu_rising_sum(mine);
    if (lane == 31)
        of_warp[e / 32] = at;
    __syncthreads();
    at -= mine;
    uint32_t all = 0;
    for (uint32_t w = 0; w < 32; w++) {
        at += w < e / 32 ? of_warp[w] : 0;
        all += of_warp[w];
    }
    for (uint32_t i = 0; i < mine; i++)
        t.entries[at + i] = { e, i * bn, min(bn, n - i * bn) };
    if (e == 0)
        *t.n_entries = all;
}

/* A tile's list of pairs; SHARED: pairs behind those of the experts, in order. */
template <class S, bool SHARED> struct piece {
    uint32_t expert, n, first, pair0;
    const uint32_t *list;
    __device__ __forceinline__ bool find(const tables &t, uint32_t rows, uint32_t k)
    {
        if (SHARED) {
            expert = 0;
            first = blockIdx.y * S::BN;
            n = min((uint32_t)S::BN, rows - first);
            pair0 = rows * k;
            return true;
        }
        if (blockIdx.y >= *t.n_entries)
            return false;
        const entry e = t.entries[blockIdx.y];
        expert = e.expert;
        n = e.n;
        first = 0;
        list = t.list + (size_t)e.expert * rows + e.first;
        return true;
    }
    __device__ __forceinline__ uint32_t pair(uint32_t i) const
    {
        return SHARED ? pair0 + first + i : list[i];
    }
    __device__ __forceinline__ uint32_t row(uint32_t i, uint32_t k) const
    {
        return SHARED ? first + i : list[i] / k;
    }
};

__device__ __forceinline__ de_cu_linear of_expert(de_cu_linear l, uint32_t e, size_t stride,
                                                  size_t scales)
{
    l.w += e * stride;
    l.scale = l.scale ? l.scale + e * scales : NULL;
    return l;
}

template <class S, bool INT8, bool GROUPS, bool SHARED>
__global__ void __launch_bounds__(T_THREADS, 1)
    gate_up_kernel(const de_cu_experts e, const bf16 *x, uint32_t rows, tables t)
{
    extern __shared__ __align__(128) char shared[];
    piece<S, SHARED> p;
    if (!p.find(t, rows, e.top_k))
        return;
    const de_cu_linear w = SHARED
                               ? e.shared_gate_up
                               : of_expert(e.gate_up, p.expert, e.gate_up_stride, e.gate_up_scales);
    const uint32_t tile0 = blockIdx.x * (S::BM / 16), half = S::BM / 2;
    const float *out = tile_product<S, INT8, GROUPS>(
        w, tile0,
        [&](uint32_t i) { return i < p.n ? x + (size_t)p.row(i, e.top_k) * e.hidden : NULL; },
        shared);
    for (uint32_t i = threadIdx.x; i < p.n * half; i += T_THREADS) {
        const uint32_t r = i / half, j = i % half, at = j / 8 * 16 + j % 8, o = tile0 * 16 + at;
        if (o >= w.out)
            continue;
        float gate = out[r * S::LD + at], up = out[r * S::LD + at + 8];
        if (INT8 && !GROUPS) {
            gate *= w.scale[o];
            up *= w.scale[o + 8];
        }
        t.act[(size_t)p.pair(r) * t.act_width + tile0 * 8 + j] =
            __float2bfloat16(cu_silu(gate) * up);
    }
}

template <class S, bool INT8, bool GROUPS, bool SHARED>
__global__ void __launch_bounds__(T_THREADS, 1)
    down_kernel(const de_cu_experts e, uint32_t rows, tables t)
{
    extern __shared__ __align__(128) char shared[];
    piece<S, SHARED> p;
    if (!p.find(t, rows, e.top_k))
        return;
    const de_cu_linear w =
        SHARED ? e.shared_down : of_expert(e.down, p.expert, e.down_stride, e.down_scales);
    const uint32_t tile0 = blockIdx.x * (S::BM / 16);
    const float *out = tile_product<S, INT8, GROUPS>(
        w, tile0,
        [&](uint32_t i) { return i < p.n ? t.act + (size_t)p.pair(i) * t.act_width : NULL; },
        shared);
    for (uint32_t i = threadIdx.x; i < p.n * S::BM; i += T_THREADS) {
        const uint32_t r = i / S::BM, o = tile0 * 16 + i % S::BM;
        if (o >= w.out)
            continue;
        float v = out[r * S::LD + i % S::BM];
        if (INT8 && !GROUPS)
            v *= w.scale[o];
        t.out[(size_t)p.pair(r) * e.hidden + o] = v;
    }
}

__global__ void __launch_bounds__(256)
    combine_kernel(uint32_t k, uint32_t hidden, uint32_t rows, tables t, float *h)
{
    const uint32_t row = blockIdx.x;
    for (uint32_t o = threadIdx.x * 4; o < hidden; o += 1024) {
        float4 s = *(const float4 *)(h + (size_t)row * hidden + o);
        for (uint32_t j = 0; j <= k; j++) {
            const size_t pair = j < k ? (size_t)row * k + j : (size_t)rows * k + row;
            const float w = t.weight[pair];
            const float4 v = *(const float4 *)(t.out + pair * hidden + o);
            s.x = fmaf(w, v.x, s.x), s.y = fmaf(w, v.y, s.y);
            s.z = fmaf(w, v.z, s.z), s.w = fmaf(w, v.w, s.w);
        }
        *(float4 *)(h + (size_t)row * hidden + o) = s;
    }
}

template <bool SHARED>
void product(cudaStream_t stream, const de_cu_experts &e, const bf16 *x, uint32_t rows,
             const tables &t, bool down, bool large)
{
    const de_cu_linear &w =
        SHARED ? (down ? e.shared_down : e.shared_gate_up) : (down ? e.down : e.gate_up);
    choose_tile(w, large, [&](auto shape, auto int8, auto groups) {
        typedef decltype(shape) S;
        constexpr bool INT8 = decltype(int8)::value, GROUPS = decltype(groups)::value;
        const uint32_t n = SHARED ? (rows + S::BN - 1) / S::BN : entries_max(e, rows, S::BN);
        const dim3 grid((w.out + S::BM - 1) / S::BM, n);
        const size_t bytes = S::template shared_bytes<INT8>();
        if (down)
            cu_launch_threads(down_kernel<S, INT8, GROUPS, SHARED>, grid, T_THREADS, bytes, stream,
                              false, e, rows, t);
        else
            cu_launch_threads(gate_up_kernel<S, INT8, GROUPS, SHARED>, grid, T_THREADS, bytes,
                              stream, false, e, x, rows, t);
    });
}

} // namespace

size_t de_cu_moe_tile_bytes(const de_cu_experts &e, uint32_t rows)
{
    size_t bytes;
    (void)tables_at(e, rows < SLICE ? rows : SLICE, NULL, &bytes);
    return bytes;
}

void de_cu_moe_tile(cudaStream_t stream, const de_cu_experts &e, const bf16 *x, const float *router,
                    size_t ldr, uint32_t rows, float *h, void *workspace)
{
    for (uint32_t r = 0; r < rows; r += SLICE) {
        const uint32_t n = rows - r < SLICE ? rows - r : SLICE, pairs = n * e.top_k;
        size_t bytes;
        const tables t = tables_at(e, n, workspace, &bytes);
        const bf16 *xs = x + (size_t)r * e.hidden;
        /* many rows an expert fill a large tile; few would waste it. A matrix whose groups need the small one decides for both:
         * they share the list. */
        const bool groups = (e.gate_up.scale && e.gate_up.group < e.gate_up.in) ||
                            (e.down.scale && e.down.group < e.down.in);
        const bool large = !groups && pairs > 48 * e.n_experts;
        if (e.n_experts <= 256)
            route_kernel<8><<<(n + 7) / 8, 256, 0, stream>>>(router + r * ldr, ldr, e.n_experts,
                                                             e.top_k, n, t);
        else
            route_kernel<32><<<(n + 7) / 8, 256, 0, stream>>>(router + r * ldr, ldr, e.n_experts,
                                                              e.top_k, n, t);
        list_kernel<<<e.n_experts, 256, 0, stream>>>(pairs, n, t);
        entries_kernel<<<1, 1024, 0, stream>>>(e.n_experts, large ? tile_large::BN : tile_small::BN,
                                               t);
        for (bool down : { false, true }) {
            product<false>(stream, e, xs, n, t, down, large);
            product<true>(stream, e, xs, n, t, down, n > 96);
        }
        combine_kernel<<<n, 256, 0, stream>>>(e.top_k, e.hidden, n, t, h + (size_t)r * e.hidden);
    }
}
