/* decode_moe.cu -- the experts of at most 64 rows: each chosen expert's weights are read once.
 *
 * Two kernels. The first prepares x, finds each row's top k (every block for itself, block 0 writes it down) and computes
 * act = silu(gate x) * up x; the second computes h += sum of weight * (down act). Work is in items: an expert, or the shared one, with
 * at most eight of its rows. Items are in rising order of expert, the shared ones last, and the second kernel adds them in
 * that order; so a row's sum has one order whatever else is in the batch. */
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/top_k.cuh"

namespace
{

enum { TOP_MAX = 16, EXPERTS_MAX = 1024, GROUP = 8 };

struct item {
    uint16_t expert; /* n_experts: the shared one */
    uint16_t n;
    uint16_t entry[8]; /* row * (top_k + 1) + choice; choice top_k: shared */
};

__host__ __device__ constexpr uint32_t items_max(uint32_t n, uint32_t k)
{
    return n * k + (n + 7) / 8;
}

/* The workspace. act: [n][top_k + 1][width] in the order of fragments. */
struct tables {
    uint32_t *n_items;
    float *weight; /* [n][top_k + 1] */
    item *items;
    bf16 *act;
    uint32_t act_width;
};

struct args {
    de_cu_experts e;
    de_cu_x x;
    const float *router;
    size_t ldr;
    uint32_t n;
    float *h;
    tables t;
};

/* What each block finds out about the routing; in shared memory. */
struct __align__(16) routing
{
    uint16_t id[DE_CU_DECODE_ROWS * TOP_MAX], rank[DE_CU_DECODE_ROWS * TOP_MAX];
    uint16_t count[EXPERTS_MAX], first[EXPERTS_MAX + 1]; /* rows; items before */
    uint32_t n_items;
};

template <int PER> __device__ __forceinline__ void route(const args &a, routing &r, item *items)
{
    const uint32_t E = a.e.n_experts, k = a.e.top_k, warp = threadIdx.x / 32,
                   lane = threadIdx.x % 32;
    for (uint32_t e = threadIdx.x; e < E; e += CU_THREADS)
        r.count[e] = 0;
    for (uint32_t row = warp; row < a.n; row += CU_WARPS) {
        uint32_t id = 0;
        float w = 0;
        const float *logits = a.router + row * a.ldr;
        cu_top_k<PER>(logits, E, k, id, w);
        if (lane < k)
            r.id[row * k + lane] = (uint16_t)id;
        if (blockIdx.x == 0 && lane <= k)
            a.t.weight[row * (k + 1) + lane] = lane < k ? w : 1.0f / (1.0f + expf(-logits[E]));
    }
    __syncthreads();
    /* rank of a row among those of its expert: rows before it */
    for (uint32_t i = threadIdx.x; i < a.n * k; i += CU_THREADS) {
        uint32_t before = 0, all = 0;
        for (uint32_t j = 0; j < a.n * k; j++) {
            const uint32_t same = r.id[j] == r.id[i];
            all += same;
            before += j < i ? same : 0;
        }
        r.rank[i] = (uint16_t)before;
        r.count[r.id[i]] = (uint16_t)all;
    }
    __syncthreads();
    if (warp == 0) {
        uint32_t sum = 0;
        for (uint32_t e0 = 0; e0 < E; e0 += 32) {
            const uint32_t mine = e0 + lane < E ? (r.count[e0 + lane] + 7u) / 8 : 0;
            uint32_t to = mine;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                const uint32_t v = __shfl_up_sync(~0u, to, d);
                to += lane >= d ? v : 0;
            }
            if (e0 + lane < E)
                r.first[e0 + lane] = (uint16_t)(sum + to - mine);
            sum += __shfl_sync(~0u, to, 31);
        }
        if (lane == 0)
            r.n_items = sum;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a.n * k; i += CU_THREADS) {
        const uint32_t e = r.id[i], at = r.first[e] + r.rank[i] / 8;
        items[at].entry[r.rank[i] % 8] = (uint16_t)(i / k * (k + 1) + i % k);
        if (r.rank[i] % 8 == 0) {
            items[at].expert = (uint16_t)e;
            items[at].n = (uint16_t)min(8u, r.count[e] - r.rank[i]);
        }
    }
    for (uint32_t i = threadIdx.x; i < a.n; i += CU_THREADS) {
        item &to = items[r.n_items + i / 8];
        to.entry[i % 8] = (uint16_t)(i * (k + 1) + k);
        if (i % 8 == 0) {
            to.expert = (uint16_t)E;
            to.n = (uint16_t)min(8u, a.n - i);
        }
    }
    __syncthreads();
}

/* One matrix of an item. */
struct part {
    const uint8_t *w;
    const float *scale;
    uint32_t tiles, groups, group; /* tiles of 32 columns */
};
__device__ __forceinline__ part of(const de_cu_linear &l, size_t w, size_t scales)
{
    part p;
    p.w = l.w + w;
    p.scale = l.scale ? l.scale + scales : NULL;
    p.tiles = l.in / 32;
    p.groups = l.scale ? l.in / l.group : 1;
    p.group = l.group;
    return p;
}
__device__ __forceinline__ part gate_up_of(const de_cu_experts &e, uint32_t expert)
{
    return expert < e.n_experts
               ? of(e.gate_up, expert * e.gate_up_stride, expert * e.gate_up_scales)
               : of(e.shared_gate_up, 0, 0);
}
__device__ __forceinline__ part down_of(const de_cu_experts &e, uint32_t expert)
{
    return expert < e.n_experts ? of(e.down, expert * e.down_stride, expert * e.down_scales)
                                : of(e.shared_down, 0, 0);
}

template <int KT>
__device__ __forceinline__ void load_tiles(uint4 (*v)[2], const part &p, uint32_t r)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < KT; k++) {
        const uint32_t c = warp + 16 * k;
        const size_t tile = (size_t)r * p.tiles + c;
        const bool has = c < p.tiles;
        if (p.scale) {
            v[k][0] = has ? cu_load(p.w + tile * 512 + lane * 16) : zero;
        } else {
            v[k][0] = has ? cu_load(p.w + tile * 1024 + lane * 16) : zero;
            v[k][1] = has ? cu_load(p.w + tile * 1024 + 512 + lane * 16) : zero;
        }
    }
}
template <int KT, bool SHARED>
__device__ __forceinline__ void sums_of(uint4 (*v)[2], const part &p, const bf16 *x, uint32_t r,
                                        float acc[4])
{
    if (p.scale)
        cu_row_sums<true, KT, SHARED>(v, x, p.tiles, p.scale, p.groups, p.group, r * 16, acc);
    else
        cu_row_sums<false, KT, SHARED>(v, x, p.tiles, NULL, 1, 1, r * 16, acc);
}

/* Blocks share the work evenly, by bytes: a tile of the shared expert, if it is BF16, counts as two. Each takes its share of the
 * shared one's tiles first, which it can load before it knows the routing. KT: tiles of 32 columns of x a warp. */
template <int PER, int KT, bool FUSED>
__global__ void __launch_bounds__(CU_THREADS, 1) gate_up_kernel(const args a)
{
    extern __shared__ __align__(16) char shared[];
    const uint32_t k1 = a.e.top_k + 1, lane = threadIdx.x % 32;
    float *sums = (float *)shared; /* two buffers */
    routing &r = *(routing *)(shared + 2 * CU_SUMS);
    item *items = (item *)((char *)&r + sizeof r);
    bf16 *xs = (bf16 *)(shared + 2 * CU_SUMS + sizeof r +
                        (sizeof(item) * items_max(a.n, a.e.top_k) + 15) / 16 * 16);
    const uint32_t tiles = a.e.width / 8, shared_tiles = a.e.shared_width / 8,
                   shared_items = (a.n + 7) / 8, all_shared = shared_tiles * shared_items;
    const uint32_t s0 = (uint32_t)((uint64_t)all_shared * blockIdx.x / gridDim.x),
                   s1 = (uint32_t)((uint64_t)all_shared * (blockIdx.x + 1) / gridDim.x);
    const part ps = gate_up_of(a.e, a.e.n_experts);
    uint4 v[2][KT][2];
    if (s0 < s1)
        load_tiles<KT>(v[0], ps, s0 / shared_items);
    cu_release();
    cu_wait();
    if (FUSED)
        cu_prepare<DE_CU_X_NORM>(a.x, a.n, a.e.hidden, xs, (float *)shared);
    route<PER>(a, r, items);
    const uint32_t n_items = r.n_items;
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0)
            *a.t.n_items = n_items + shared_items;
        for (uint32_t i = threadIdx.x; i < n_items + shared_items; i += CU_THREADS)
            a.t.items[i] = items[i];
    }
    /* units [u0, u1) of the experts: n_items * tiles of them */
    const uint64_t cost = ps.scale ? 1 : 2, units = (uint64_t)n_items * tiles,
                   total = units + cost * all_shared;
    uint64_t u0 = total * blockIdx.x / gridDim.x, u1 = total * (blockIdx.x + 1) / gridDim.x;
    if (units >= 4 * gridDim.x) { /* else a share may be smaller than its shared part */
        u0 = max((int64_t)u0 - (int64_t)(cost * s0), (int64_t)0);
        u1 = blockIdx.x + 1 == gridDim.x ? units
                                         : max((int64_t)u1 - (int64_t)(cost * s1), (int64_t)0);
    } else {
        u0 = units * blockIdx.x / gridDim.x;
        u1 = units * (blockIdx.x + 1) / gridDim.x;
    }
    const uint32_t n_shared = s1 - s0, n_mine = n_shared + (uint32_t)(u1 > u0 ? u1 - u0 : 0);
    auto unit = [&](uint32_t i, uint32_t &ret_item, uint32_t &ret_tile) {
        if (i < n_shared) { /* tile by tile, its items in turn */
            ret_item = n_items + (s0 + i) % shared_items;
            ret_tile = (s0 + i) / shared_items;
        } else {
            const uint64_t u = u0 + (i - n_shared);
            ret_item = (uint32_t)(u / tiles);
            ret_tile = (uint32_t)(u % tiles);
        }
    };
    auto load = [&](uint4(*to)[2], uint32_t i) {
        uint32_t at, tile;
        if (i >= n_mine)
            return;
        unit(i, at, tile);
        load_tiles<KT>(to, gate_up_of(a.e, items[at].expert), tile);
    };
    if (n_shared == 0)
        load(v[0], 0);
    load(v[1], 1);
    int buffer = 0;
    for (uint32_t i0 = 0; i0 < n_mine; i0 += 2)
#pragma unroll
        for (int d = 0; d < 2; d++) {
            const uint32_t i = i0 + d;
            if (i >= n_mine)
                break;
            uint32_t at, tile;
            unit(i, at, tile);
            const item &it = items[at];
            const uint32_t entry = it.entry[lane / 4 < it.n ? lane / 4 : 0], row = entry / k1;
            const bf16 *x =
                FUSED ? xs + row * cu_x_stride(a.e.hidden) : a.x.ready + (size_t)row * a.e.hidden;
            const part p = gate_up_of(a.e, it.expert);
            float acc[4];
            sums_of<KT, FUSED>(v[d], p, x + lane % 4 * 8, tile, acc);
            load(v[d], i + 2);
            cu_put_sums(sums + buffer * (CU_SUMS / 4), acc);
            __syncthreads();
            if (threadIdx.x < 64 && threadIdx.x / 8 < it.n) {
                const uint32_t j = threadIdx.x % 8, column = tile * 8 + j;
                float gate = cu_get_sum(sums + buffer * (CU_SUMS / 4), threadIdx.x / 8, j),
                      up = cu_get_sum(sums + buffer * (CU_SUMS / 4), threadIdx.x / 8, j + 8);
                if (p.scale && p.groups == 1) {
                    gate *= p.scale[tile * 16 + j];
                    up *= p.scale[tile * 16 + j + 8];
                }
                a.t.act[(size_t)it.entry[threadIdx.x / 8] * a.t.act_width + cu_x_place(column)] =
                    __float2bfloat16(cu_silu(gate) * up);
            }
            buffer ^= 1;
        }
}

/* A block has 16 outputs and goes over all items, GROUP at a time; warp w then owns output w. */
template <int KT> __global__ void __launch_bounds__(CU_THREADS, 1) down_kernel(const args a)
{
    extern __shared__ __align__(16) char shared[];
    constexpr int G = KT == 1 ? GROUP : 2;
    float *sums = (float *)shared;                      /* [G] of CU_SUMS */
    float *total = (float *)(shared + GROUP * CU_SUMS); /* [n][16] */
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, k1 = a.e.top_k + 1;
    cu_release();
    const part ps = down_of(a.e, a.e.n_experts);
    cu_wait();
    const uint32_t n_items = *a.t.n_items;
    for (uint32_t r = blockIdx.x; r < a.e.hidden / 16; r += gridDim.x) {
        for (uint32_t i = lane; i < a.n; i += 32)
            total[i * 16 + warp] = a.h[(size_t)i * a.e.hidden + r * 16 + warp];
        __syncwarp();
        for (uint32_t i0 = 0; i0 < n_items; i0 += G) {
            uint4 v[G][KT][2];
#pragma unroll
            for (int g = 0; g < G; g++)
                if (i0 + g < n_items) {
                    const uint32_t e = a.t.items[i0 + g].expert;
                    load_tiles<KT>(v[g], e < a.e.n_experts ? down_of(a.e, e) : ps, r);
                }
            if (i0)
                __syncthreads(); /* sums are read */
#pragma unroll
            for (int g = 0; g < G; g++)
                if (i0 + g < n_items) {
                    const item &it = a.t.items[i0 + g];
                    const uint32_t entry = it.entry[lane / 4 < it.n ? lane / 4 : 0];
                    float acc[4];
                    sums_of<KT, false>(
                        v[g], it.expert < a.e.n_experts ? down_of(a.e, it.expert) : ps,
                        a.t.act + (size_t)entry * a.t.act_width + lane % 4 * 8, r, acc);
                    cu_put_sums(sums + g * (CU_SUMS / 4), acc);
                }
            __syncthreads();
            /* lane: row lane % 8 of item g = lane / 8 + 4 j; the items' turns are kept by the loop */
#pragma unroll
            for (int j = 0; j < (G + 3) / 4; j++) {
                const uint32_t g = j * 4 + lane / 8, row = lane % 8, i = i0 + g;
                float y = 0;
                uint32_t entry = 0;
                bool has = g < G && i < n_items;
                if (has) {
                    const item &it = a.t.items[i];
                    has = row < it.n;
                    if (has) {
                        entry = it.entry[row];
                        y = cu_get_sum(sums + g * (CU_SUMS / 4), row, warp);
                        const part p = it.expert < a.e.n_experts ? down_of(a.e, it.expert) : ps;
                        if (p.scale && p.groups == 1)
                            y *= p.scale[r * 16 + warp];
                    }
                }
                const float weight = has ? a.t.weight[entry] : 0;
#pragma unroll
                for (int turn = 0; turn < 4; turn++) {
                    if (has && lane / 8 == turn) {
                        float *to = &total[entry / k1 * 16 + warp];
                        *to = fmaf(weight, y, *to);
                    }
                    __syncwarp();
                }
            }
        }
        for (uint32_t i = lane; i < a.n; i += 32)
            a.h[(size_t)i * a.e.hidden + r * 16 + warp] = total[i * 16 + warp];
        __syncthreads();
    }
}

tables tables_at(const de_cu_experts &e, uint32_t n, void *workspace, size_t *ret_bytes)
{
    const uint32_t n_items = items_max(n, e.top_k);
    char *at = (char *)workspace;
    tables t;
    auto take = [&](size_t bytes) {
        char *p = at;
        at += (bytes + 255) / 256 * 256;
        return p;
    };
    t.act_width = e.width > e.shared_width ? e.width : e.shared_width;
    t.n_items = (uint32_t *)take(sizeof *t.n_items);
    t.weight = (float *)take((size_t)n * (e.top_k + 1) * sizeof *t.weight);
    t.items = (item *)take((size_t)n_items * sizeof *t.items);
    t.act = (bf16 *)take((size_t)n * (e.top_k + 1) * t.act_width * sizeof *t.act);
    *ret_bytes = (size_t)(at - (char *)workspace);
    return t;
}

template <int PER, int KT, bool FUSED>
void launch_gate_up(cudaStream_t stream, const args &a, bool dependent)
{
    const size_t bytes = 2 * CU_SUMS + sizeof(routing) +
                         (sizeof(item) * items_max(a.n, a.e.top_k) + 15) / 16 * 16 +
                         (FUSED ? 8 * cu_x_stride(a.e.hidden) * sizeof(bf16) : 0);
    const uint32_t pieces = a.n * a.e.top_k * (a.e.width / 8) + a.e.shared_width / 8;
    cu_launch(gate_up_kernel<PER, KT, FUSED>, dim3(cu_blocks(pieces)), bytes, stream, dependent, a);
}
template <int PER, int KT> void choose_source(cudaStream_t stream, const args &a, bool dependent)
{
    if (a.x.ready)
        launch_gate_up<PER, KT, false>(stream, a, dependent);
    else
        launch_gate_up<PER, KT, true>(stream, a, dependent);
}

} // namespace

size_t de_cu_decode_moe_bytes(const de_cu_experts &e, uint32_t n)
{
    size_t bytes;
    (void)tables_at(e, n, NULL, &bytes);
    return bytes;
}

void de_cu_decode_moe(cudaStream_t stream, const de_cu_experts &e, const de_cu_x &x,
                      const float *router, size_t ldr, uint32_t n, float *h, void *workspace,
                      bool dependent)
{
    size_t bytes;
    args a;
    a.e = e;
    a.x = x;
    a.router = router;
    a.ldr = ldr;
    a.n = n;
    a.h = h;
    a.t = tables_at(e, n, workspace, &bytes);
    if (e.n_experts <= 256 && e.hidden <= 2048)
        choose_source<8, 4>(stream, a, dependent);
    else
        choose_source<32, 8>(stream, a, dependent);
    const size_t shared = GROUP * CU_SUMS + (size_t)n * 16 * sizeof(float);
    const dim3 grid(cu_blocks(e.hidden / 16));
    if (a.t.act_width <= 512)
        cu_launch(down_kernel<1>, grid, shared, stream, dependent, a);
    else
        cu_launch(down_kernel<4>, grid, shared, stream, dependent, a);
}
