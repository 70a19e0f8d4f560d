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
    t.max_entries = entries_max(e, rows, 16);
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

enum { LIST_WARPS = 16 };

/* A block lists the pairs of its expert, in order: each warp counts those of its part, then writes them behind the ones before. */
__global__ void __launch_bounds__(LIST_WARPS * 32)
    list_kernel(uint32_t pairs, uint32_t rows, tables t)
{
    __shared__ uint32_t of_warp[LIST_WARPS];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32,
                   part = (pairs + LIST_WARPS * 128 - 1) / (LIST_WARPS * 128) * 128,
                   end = min(pairs, (warp + 1) * part);
    const auto found = [&](uint32_t i) { /* bit j: pair i + j is this expert's */
                                         uint32_t mine = 0;
                                         if (i + 4 <= end) {
                                             const uint4 v = *(const uint4 *)(t.id + i);
                                             mine = (v.x == blockIdx.x) | (v.y == blockIdx.x) << 1 |
                                                    (v.z == blockIdx.x) << 2 |
                                                    (v.w == blockIdx.x) << 3;
                                         } else {
                                             for (uint32_t j = 0; i + j < end; j++)
                                                 mine |= (t.id[i + j] == blockIdx.x) << j;
                                         }
                                         return mine;
    };
    uint32_t n = 0;
#pragma unroll 4
    for (uint32_t i = warp * part + lane * 4; i < end; i += 128)
        n += __popc(found(i));
    n = __reduce_add_sync(~0u, n);
    if (lane == 0)
        of_warp[warp] = n;
    __syncthreads();
    uint32_t at = 0, all = 0;
#pragma unroll
    for (uint32_t w = 0; w < LIST_WARPS; w++) {
        at += w < warp ? of_warp[w] : 0;
        all += of_warp[w];
    }
    uint32_t *to = t.list + (size_t)blockIdx.x * rows;
#pragma unroll 4
    for (uint32_t i0 = warp * part; i0 < end; i0 += 128) {
        const uint32_t i = i0 + lane * 4, mine = i < end ? found(i) : 0;
        if (!__any_sync(~0u, mine))
            continue;
        const uint32_t before = cu_rising_sum((uint32_t)__popc(mine));
        uint32_t p = at + before - __popc(mine);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (mine >> j & 1)
                to[p++] = i + j;
        at += __shfl_sync(~0u, before, 31);
    }
    if (threadIdx.x == 0)
        t.count[blockIdx.x] = all;
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

/* A tile's pairs into shared memory. `shared`: of the shared expert, pairs behind those of the others, in order. False: no tile. */
template <int BN>
__device__ __forceinline__ bool find_pairs(const tables &t, uint32_t rows, uint32_t k, bool shared,
                                           uint32_t *ret_pairs, uint32_t &ret_n,
                                           uint32_t &ret_expert)
{
    const uint32_t first = blockIdx.y * BN;
    entry e = { 0, first, min((uint32_t)BN, rows - first) };
    if (!shared) {
        if (blockIdx.y >= *t.n_entries)
            return false;
        e = t.entries[blockIdx.y];
    }
    for (uint32_t i = threadIdx.x; i < e.n; i += blockDim.x)
        ret_pairs[i] =
            shared ? rows * k + first + i : t.list[(size_t)e.expert * rows + e.first + i];
    __syncthreads();
    ret_n = e.n;
    ret_expert = e.expert;
    return true;
}

__device__ __forceinline__ de_cu_linear of_expert(de_cu_linear l, uint32_t e, size_t stride,
                                                  size_t scales)
{
    l.w += e * stride;
    l.scale = l.scale ? l.scale + e * scales : NULL;
    return l;
}

template <class S, bool INT8, bool GROUPS>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    gate_up_kernel(const de_cu_experts e, const bf16 *x, uint32_t rows, bool is_shared, tables t)
{
    if constexpr (tile_is_here<S, GROUPS>()) {
        extern __shared__ __align__(1024) char shared[];
        __shared__ uint32_t pairs[S::BN];
        uint32_t n, expert;
        if (!find_pairs<S::BN>(t, rows, e.top_k, is_shared, pairs, n, expert))
            return;
        const de_cu_linear w =
            is_shared ? e.shared_gate_up
                      : of_expert(e.gate_up, expert, e.gate_up_stride, e.gate_up_scales);
        const uint32_t tile0 = blockIdx.x * (S::BM / 16), half = S::BM / 2, behind = rows * e.top_k;
        const float *out = tile_product<S, INT8, GROUPS>(
            w, tile0,
            [&](uint32_t i) {
                return i < n ? x + (size_t)(is_shared ? pairs[i] - behind : pairs[i] / e.top_k) *
                                       e.hidden
                             : NULL;
            },
            shared);
        for (uint32_t i = threadIdx.x * 4; i < n * half; i += S::THREADS * 4) {
            const uint32_t r = i / half, j = i % half, at = j / 8 * 16 + j % 8, o = tile0 * 16 + at;
            if (o >= w.out)
                continue;
            const float4 gate = tile_get < INT8 && !GROUPS > (out + r * S::LD + at, w, o),
                         up = tile_get < INT8 && !GROUPS > (out + r * S::LD + at + 8, w, o + 8);
            *(uint2 *)(t.act + (size_t)pairs[r] * t.act_width + tile0 * 8 + j) =
                make_uint2(cu_pack(cu_silu(gate.x) * up.x, cu_silu(gate.y) * up.y),
                           cu_pack(cu_silu(gate.z) * up.z, cu_silu(gate.w) * up.w));
        }
    }
}

template <class S, bool INT8, bool GROUPS>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    down_kernel(const de_cu_experts e, uint32_t rows, bool is_shared, tables t)
{
    if constexpr (tile_is_here<S, GROUPS>()) {
        extern __shared__ __align__(1024) char shared[];
        __shared__ uint32_t pairs[S::BN];
        uint32_t n, expert;
        if (!find_pairs<S::BN>(t, rows, e.top_k, is_shared, pairs, n, expert))
            return;
        const de_cu_linear w =
            is_shared ? e.shared_down : of_expert(e.down, expert, e.down_stride, e.down_scales);
        const uint32_t tile0 = blockIdx.x * (S::BM / 16);
        const float *out = tile_product<S, INT8, GROUPS>(
            w, tile0,
            [&](uint32_t i) { return i < n ? t.act + (size_t)pairs[i] * t.act_width : NULL; },
            shared);
        for (uint32_t i = threadIdx.x * 4; i < n * S::BM; i += S::THREADS * 4) {
            const uint32_t r = i / S::BM, o = tile0 * 16 + i % S::BM;
            if (o < w.out)
                *(float4 *)(t.out + (size_t)pairs[r] * e.hidden + o) =
                    tile_get < INT8 && !GROUPS > (out + r * S::LD + i % S::BM, w, o);
        }
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

void product(cudaStream_t stream, const de_cu_experts &e, const bf16 *x, uint32_t rows,
             const tables &t, bool down, bool shared, tile_size size)
{
    const de_cu_linear &w =
        shared ? (down ? e.shared_down : e.shared_gate_up) : (down ? e.down : e.gate_up);
    choose_tile(w, size, [&](auto shape, auto int8, auto groups) {
        typedef decltype(shape) S;
        constexpr bool INT8 = decltype(int8)::value, GROUPS = decltype(groups)::value;
        const uint32_t n = shared ? (rows + S::BN - 1) / S::BN : entries_max(e, rows, S::BN);
        const dim3 grid((w.out + S::BM - 1) / S::BM, n);
        const size_t bytes = S::template shared_bytes<INT8>();
        if (down)
            cu_launch_threads(down_kernel<S, INT8, GROUPS>, grid, S::THREADS, bytes, stream, false,
                              e, rows, shared, t);
        else
            cu_launch_threads(gate_up_kernel<S, INT8, GROUPS>, grid, S::THREADS, bytes, stream,
                              false, e, x, rows, shared, t);
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
        /* A tile for more than an expert's share of rows, by what was fastest: wider ones waste products, narrower ones read weights again. */
        const uint32_t share = pairs / e.n_experts;
        tile_size size = share > 80   ? TILE_128
                         : share > 40 ? TILE_96
                         : share > 20 ? TILE_64
                         : share > 6  ? TILE_32
                                      : TILE_16;
        /* A matrix whose groups need the small one decides for both: they share the list. */
        const bool groups = tile_has_groups(e.gate_up) || tile_has_groups(e.down);
        if (groups)
            size = TILE_32;
        if (e.n_experts <= 256)
            route_kernel<8><<<(n + 7) / 8, 256, 0, stream>>>(router + r * ldr, ldr, e.n_experts,
                                                             e.top_k, n, t);
        else
            route_kernel<32><<<(n + 7) / 8, 256, 0, stream>>>(router + r * ldr, ldr, e.n_experts,
                                                              e.top_k, n, t);
        list_kernel<<<e.n_experts, LIST_WARPS * 32, 0, stream>>>(pairs, n, t);
        entries_kernel<<<1, 1024, 0, stream>>>(e.n_experts, tile_rows(groups, size), t);
        for (bool down : { false, true }) {
            const uint32_t out = down ? e.hidden : 2 * e.shared_width;
            product(stream, e, xs, n, t, down, false, size);
            product(stream, e, xs, n, t, down, true, tile_for(out, n));
        }
        combine_kernel<<<n, 256, 0, stream>>>(e.top_k, e.hidden, n, t, h + (size_t)r * e.hidden);
    }
}
