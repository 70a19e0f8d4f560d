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

enum { TOP_MAX = 16, EXPERTS_MAX = 1024 };

struct __align__(16) item
{
    const uint8_t *w; /* the matrix that the kernel in hand wants, and its scales */
    const float *scale;
    uint16_t expert; /* n_experts: the shared one */
    uint16_t n;
    uint8_t row[8];
    uint16_t entry[8]; /* row * (top_k + 1) + choice; choice top_k: shared */
};

__host__ __device__ constexpr uint32_t items_max(uint32_t n, uint32_t k)
{
    return n * k + (n + 7) / 8;
}

/* Totals and weights in the second kernel's shared memory. */
__host__ __device__ constexpr uint32_t tables_bytes(uint32_t n, uint32_t k)
{
    return ((n * 16 + n * (k + 1)) * 4 + 15) / 16 * 16;
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

/* Sets the expert of an item, and where its gate_up or down lies. */
template <bool GATE_UP>
__device__ __forceinline__ void point(const de_cu_experts &e, uint32_t expert, item &to)
{
    const bool own = expert < e.n_experts;
    const de_cu_linear &l =
        GATE_UP ? (own ? e.gate_up : e.shared_gate_up) : (own ? e.down : e.shared_down);
    to.expert = (uint16_t)expert;
    to.w = l.w + (own ? expert * (GATE_UP ? e.gate_up_stride : e.down_stride) : 0);
    to.scale = l.scale ? l.scale + (own ? expert * (GATE_UP ? e.gate_up_scales : e.down_scales) : 0)
                       : NULL;
}

/* The choices of each row, a warp a row; the rest of routing begins behind a barrier. */
template <int PER> __device__ __forceinline__ void choose(const args &a, routing &r, item *items)
{
    const uint32_t E = a.e.n_experts, k = a.e.top_k, warp = threadIdx.x / 32,
                   lane = threadIdx.x % 32;
    for (uint32_t row = warp; row < a.n; row += CU_WARPS) {
        uint32_t id = 0;
        float w = 0;
        const float *logits = a.router + row * a.ldr;
        const float shared = logits[E];
        cu_top_k<PER>(logits, E, k, id, w);
        if (lane < k)
            r.id[row * k + lane] = (uint16_t)id;
        if (blockIdx.x == 0 && lane <= k)
            a.t.weight[row * (k + 1) + lane] = lane < k ? w : 1.0f / (1.0f + expf(-shared));
        if (a.n > 1)
            continue;
        uint32_t rank = 0; /* one row: its choices are the items */
        for (uint32_t j = 0; j < k; j++)
            rank += __shfl_sync(~0u, id, j) < id;
        if (lane <= k) {
            item &to = items[lane < k ? rank : k];
            point<true>(a.e, lane < k ? id : E, to);
            to.n = 1;
            to.row[0] = 0;
            to.entry[0] = (uint16_t)lane;
        }
        if (lane == 0)
            r.n_items = k;
    }
    if (a.n > 1)
        for (uint32_t e = threadIdx.x; e < E; e += CU_THREADS)
            r.count[e] = 0;
}

/* The items, from the choices of several rows. Begins behind a barrier and ends with one. */
__device__ __forceinline__ void make_items(const args &a, routing &r, item *items)
{
    const uint32_t E = a.e.n_experts, k = a.e.top_k, warp = threadIdx.x / 32,
                   lane = threadIdx.x % 32;
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
            const uint32_t to = cu_rising_sum(mine);
            if (e0 + lane < E)
                r.first[e0 + lane] = (uint16_t)(sum + to - mine);
            sum += __shfl_sync(~0u, to, 31);
        }
        if (lane == 0)
            r.n_items = sum;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a.n * k; i += CU_THREADS) {
        const uint32_t e = r.id[i], at = r.first[e] + r.rank[i] / 8, row = i / k;
        items[at].entry[r.rank[i] % 8] = (uint16_t)(row * (k + 1) + i % k);
        items[at].row[r.rank[i] % 8] = (uint8_t)row;
        if (r.rank[i] % 8 == 0) {
            point<true>(a.e, e, items[at]);
            items[at].n = (uint16_t)min(8u, r.count[e] - r.rank[i]);
        }
    }
    for (uint32_t i = threadIdx.x; i < a.n; i += CU_THREADS) {
        item &to = items[r.n_items + i / 8];
        to.entry[i % 8] = (uint16_t)(i * (k + 1) + k);
        to.row[i % 8] = (uint8_t)i;
        if (i % 8 == 0) {
            point<true>(a.e, E, to);
            to.n = (uint16_t)min(8u, a.n - i);
        }
    }
    __syncthreads();
}

/* FORMAT: what is known when compiling. Most checkpoints are INT8 with one scale a row and BF16 in the shared expert; code for what
 * does not occur would only be fetched and skipped. */
enum { ANY, INT8, BF16 };

/* A matrix: of an item, or the shared expert's. */
struct part {
    const uint8_t *w;
    const float *scale;
    uint32_t tiles, groups, group; /* tiles of 32 columns */
};
__device__ __forceinline__ part part_of(const de_cu_linear &l, const uint8_t *w, const float *scale)
{
    return { w, scale, l.in / 32, l.scale ? l.in / l.group : 1, l.group };
}

template <int FORMAT, int KT>
__device__ __forceinline__ void load_part(uint4 (*v)[2], const part &p, uint32_t r)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < KT; k++) {
        const uint32_t c = warp + 16 * k;
        const size_t tile = (size_t)r * p.tiles + c;
        const bool has = c < p.tiles;
        if (FORMAT == INT8 || (FORMAT == ANY && p.scale)) {
            v[k][0] = has ? cu_load(p.w + tile * 512 + lane * 16) : zero;
        } else {
            v[k][0] = has ? cu_load(p.w + tile * 1024 + lane * 16) : zero;
            v[k][1] = has ? cu_load(p.w + tile * 1024 + 512 + lane * 16) : zero;
        }
    }
}
template <int FORMAT, int KT, bool SHARED>
__device__ __forceinline__ void sums_of(uint4 (*v)[2], const part &p, const bf16 *x, uint32_t r,
                                        float acc[4])
{
    if (FORMAT == ANY && p.scale && p.groups > 1)
        cu_row_sums<true, true, KT, SHARED>(v, x, p.tiles, p.scale, p.groups, p.group, r * 16, acc);
    else if (FORMAT == INT8 || (FORMAT == ANY && p.scale))
        cu_row_sums<true, false, KT, SHARED>(v, x, p.tiles, NULL, 1, 1, 0, acc);
    else
        cu_row_sums<false, false, KT, SHARED>(v, x, p.tiles, NULL, 1, 1, 0, acc);
}
template <int FORMAT> __device__ __forceinline__ bool has_scale(const part &p)
{
    return FORMAT == INT8 || (FORMAT == ANY && p.scale && p.groups == 1);
}

/* A tile of gate_up for an item's rows. */
struct place {
    uint32_t item, tile;
};

/* Sums of 16 outputs (8 gates, 8 ups) for an item's rows, into `sums`. */
template <int FORMAT, int KT, bool FUSED>
__device__ __forceinline__ void unit_sums(const args &a, const item &it, const part &p,
                                          uint32_t tile, uint4 (*v)[2], const bf16 *xs, float *sums)
{
    const uint32_t lane = threadIdx.x % 32, row = it.row[lane / 4 < it.n ? lane / 4 : 0];
    const bf16 *x =
        FUSED ? xs + row * cu_x_stride(a.e.hidden) : a.x.ready + (size_t)row * a.e.hidden;
    float acc[4];
    sums_of<FORMAT, KT, FUSED>(v, p, x + lane % 4 * 8, tile, acc);
    cu_put_sums(sums, acc);
}
/* Activations of a unit, by 64 threads: thread t has row t / 8 and column t % 8. */
template <int FORMAT>
__device__ __forceinline__ void unit_act(const args &a, const item &it, const part &p,
                                         uint32_t tile, const float *sums, const float scales[2],
                                         uint32_t t)
{
    const uint32_t j = t % 8;
    if (t / 8 < it.n) {
        const float gate = cu_get_sum(sums, t / 8, j) * scales[0],
                    up = cu_get_sum(sums, t / 8, j + 8) * scales[1];
        a.t.act[(size_t)it.entry[t / 8] * a.t.act_width + cu_x_place(tile * 8 + j)] =
            __float2bfloat16(cu_silu(gate) * up);
    }
}
template <int FORMAT>
__device__ __forceinline__ void unit_scales(const part &p, uint32_t tile, uint32_t t,
                                            float scales[2])
{
    scales[0] = scales[1] = 1;
    if (has_scale<FORMAT>(p)) {
        scales[0] = p.scale[tile * 16 + t % 8];
        scales[1] = p.scale[tile * 16 + t % 8 + 8];
    }
}

/* Blocks share the work evenly, by bytes: a tile of the shared expert, if it is BF16, counts as two. Each takes its share of the
 * shared one's tiles first, which it can load before it knows the routing. U units are under way and go to one barrier. KT: tiles of
 * 32 columns of x a warp; E, S: formats. */
template <int E, int S, int PER, int KT, int U, bool FUSED>
__global__ void __launch_bounds__(CU_THREADS, 1) gate_up_kernel(const args a)
{
    extern __shared__ __align__(16) char shared[];
    float *sums = (float *)shared; /* two buffers for U units */
    routing &r = *(routing *)(shared + 2 * U * CU_SUMS);
    item *items = (item *)((char *)&r + sizeof r);
    bf16 *xs = (bf16 *)(shared + 2 * U * CU_SUMS + sizeof r +
                        (sizeof(item) * items_max(a.n, a.e.top_k) + 15) / 16 * 16);
    const uint32_t tiles = a.e.width / 8, shared_items = (a.n + 7) / 8,
                   all_shared = a.e.shared_width / 8 * shared_items, group = threadIdx.x / 64,
                   t = threadIdx.x % 64;
    const uint32_t s0 = all_shared * blockIdx.x / gridDim.x,
                   s1 = all_shared * (blockIdx.x + 1) / gridDim.x;
    const part ps = part_of(a.e.shared_gate_up, a.e.shared_gate_up.w, a.e.shared_gate_up.scale);
    uint4 vs[KT][2];
    if (s0 < s1)
        load_part<S, KT>(vs, ps, s0 / shared_items);
    cu_release();
    if (FUSED) /* x was there before the router ran (ops.cuh) */
        cu_prepare<DE_CU_X_NORM>(a.x, a.n, a.e.hidden, xs, (float *)shared);
    cu_wait();
    choose<PER>(a, r, items);
    __syncthreads();
    if (a.n > 1)
        make_items(a, r, items);
    const uint32_t n_items = r.n_items;
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0)
            *a.t.n_items = n_items + shared_items;
        for (uint32_t i = threadIdx.x; i < n_items + shared_items; i += CU_THREADS)
            a.t.items[i] = items[i];
    }
    /* units [u0, u1) of the experts: n_items * tiles of them, below 2^31 */
    const uint32_t cost = ps.scale ? 1 : 2, units = n_items * tiles,
                   total = units + cost * all_shared;
    uint32_t u0, u1;
    if (units >= 4 * gridDim.x) {
        u0 = (uint32_t)((uint64_t)total * blockIdx.x / gridDim.x);
        u1 = (uint32_t)((uint64_t)total * (blockIdx.x + 1) / gridDim.x);
        u0 = u0 > cost * s0 ? u0 - cost * s0 : 0;
        u1 = u1 > cost * s1 ? u1 - cost * s1 : 0;
        u1 = blockIdx.x + 1 == gridDim.x ? units : u1;
    } else { /* a share may be smaller than its shared part */
        u0 = units * blockIdx.x / gridDim.x;
        u1 = units * (blockIdx.x + 1) / gridDim.x;
    }
    place next = { u0 / tiles, u0 % tiles }, at[U]; /* next: whose weights are loaded next */
    uint32_t left = u1 > u0 ? u1 - u0 : 0, loads = left;
    uint4 v[U][KT][2];
    auto load = [&](uint4(*to)[2], place &of) {
        of = next;
        if (loads == 0)
            return;
        load_part<E, KT>(to, part_of(a.e.gate_up, items[next.item].w, items[next.item].scale),
                         next.tile);
        loads--;
        if (++next.tile == tiles) {
            next.tile = 0;
            next.item++;
        }
    };
#pragma unroll
    for (int u = 0; u < U; u++)
        load(v[u], at[u]);
    int buffer = 0;
    for (uint32_t i = s0; i < s1; i++) {
        const item &it = items[n_items + i % shared_items];
        const uint32_t tile = i / shared_items;
        float *const to = sums + buffer * U * (CU_SUMS / 4), scales[2];
        if (i > s0)
            load_part<S, KT>(vs, ps, tile);
        unit_scales<S>(ps, tile, t, scales);
        unit_sums<S, KT, FUSED>(a, it, ps, tile, vs, xs, to);
        __syncthreads();
        if (group == 0)
            unit_act<S>(a, it, ps, tile, to, scales, t);
        buffer ^= 1;
    }
    while (left) {
        const uint32_t n = left < U ? left : U;
        float *const to = sums + buffer * U * (CU_SUMS / 4);
        place mine = at[0]; /* the unit that this thread's group stores */
        float scales[2];
#pragma unroll
        for (int u = 1; u < U; u++)
            mine = group == u ? at[u] : mine;
        const part p = part_of(a.e.gate_up, items[mine.item].w, items[mine.item].scale);
        if (group < n)
            unit_scales<E>(p, mine.tile, t, scales);
#pragma unroll
        for (int u = 0; u < U; u++)
            if (u < (int)n) {
                const item &it = items[at[u].item];
                unit_sums<E, KT, FUSED>(a, it, part_of(a.e.gate_up, it.w, it.scale), at[u].tile,
                                        v[u], xs, to + u * (CU_SUMS / 4));
                load(v[u], at[u]);
            }
        __syncthreads();
        if (group < n)
            unit_act<E>(a, items[mine.item], p, mine.tile, to + group * (CU_SUMS / 4), scales, t);
        buffer ^= 1;
        left -= n;
    }
}

/* A block has 16 outputs and goes over all items, G of the experts' at a time, the weights of the next G under way (with one buffer:
 * all of a row's at once), the shared one's last. Warp w owns output w of the sums. The first tiles of the shared expert are loaded
 * before the items are known. */
template <int E, int S, int KT, int G, int BUFFERS>
__global__ void __launch_bounds__(CU_THREADS, 1) down_kernel(const args a)
{
    extern __shared__ __align__(16) char shared[];
    float *sums = (float *)shared;                  /* [G] of CU_SUMS */
    float *total = (float *)(shared + G * CU_SUMS); /* [n][16] */
    float *weight = total + a.n * 16;               /* [n][top_k + 1] */
    item *items = (item *)(shared + G * CU_SUMS + tables_bytes(a.n, a.e.top_k));
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, k1 = a.e.top_k + 1,
                   n_shared = (a.n + 7) / 8, most = a.n * a.e.top_k + n_shared;
    const part ps = part_of(a.e.shared_down, a.e.shared_down.w, a.e.shared_down.scale);
    uint4 first[KT][2];
    load_part<S, KT>(first, ps, blockIdx.x);
    cu_release();
    cu_wait();
    const uint32_t n_items = *a.t.n_items - n_shared;
    /* all that there can be, so as not to wait for their number */
    for (uint32_t i = threadIdx.x; i < most; i += CU_THREADS) {
        item it = a.t.items[i];
        point<false>(a.e, it.expert, it);
        items[i] = it;
    }
    for (uint32_t i = threadIdx.x; i < a.n * k1; i += CU_THREADS)
        weight[i] = a.t.weight[i];
    /* one item's sums into its rows' totals: lane is a row of the item */
    auto add = [&](const item &it, const float *from, float scale) {
        if (lane < it.n) {
            float *to = &total[it.row[lane] * 16 + warp];
            *to = fmaf(weight[it.entry[lane]], cu_get_sum(from, lane, warp) * scale, *to);
        }
        __syncwarp();
    };
    auto act_of = [&](const item &it) {
        return a.t.act + (size_t)it.entry[lane / 4 < it.n ? lane / 4 : 0] * a.t.act_width +
               lane % 4 * 8;
    };
    for (uint32_t r = blockIdx.x; r < a.e.hidden / 16; r += gridDim.x) {
        for (uint32_t i = lane; i < a.n; i += 32)
            total[i * 16 + warp] = a.h[(size_t)i * a.e.hidden + r * 16 + warp];
        __syncthreads();
        uint4 v[BUFFERS][G][KT][2];
        auto load = [&](uint4(*to)[KT][2], uint32_t i0) {
#pragma unroll
            for (int g = 0; g < G; g++)
                if (i0 + g < n_items)
                    load_part<E, KT>(to[g], part_of(a.e.down, items[i0 + g].w, items[i0 + g].scale),
                                     r);
        };
        load(v[0], 0);
        for (uint32_t at = 0; at < n_items; at += BUFFERS * G)
#pragma unroll
            for (int d = 0; d < BUFFERS; d++) {
                const uint32_t i0 = at + d * G;
                if (i0 >= n_items)
                    break;
                if (BUFFERS == 2)
                    load(v[(d + 1) % BUFFERS], i0 + G);
                float scale[G];
#pragma unroll
                for (int g = 0; g < G; g++) {
                    scale[g] = 1;
                    if (i0 + g < n_items) {
                        const part p = part_of(a.e.down, items[i0 + g].w, items[i0 + g].scale);
                        if (has_scale<E>(p))
                            scale[g] = p.scale[r * 16 + warp];
                    }
                }
#pragma unroll
                for (int g = 0; g < G; g++)
                    if (i0 + g < n_items) {
                        const item &it = items[i0 + g];
                        float acc[4];
                        sums_of<E, KT, false>(v[d][g], part_of(a.e.down, it.w, it.scale),
                                              act_of(it), r, acc);
                        cu_put_sums(sums + g * (CU_SUMS / 4), acc);
                    }
                __syncthreads();
#pragma unroll
                for (int g = 0; g < G; g++)
                    if (i0 + g < n_items)
                        add(items[i0 + g], sums + g * (CU_SUMS / 4), scale[g]);
                __syncthreads(); /* sums are read */
                if (BUFFERS == 1)
                    load(v[0], i0 + G);
            }
        for (uint32_t i = 0; i < n_shared; i++) {
            const item &it = items[n_items + i];
            const float scale = has_scale<S>(ps) ? ps.scale[r * 16 + warp] : 1;
            float acc[4];
            if (r != blockIdx.x)
                load_part<S, KT>(first, ps, r);
            sums_of<S, KT, false>(first, ps, act_of(it), r, acc);
            cu_put_sums(sums, acc);
            __syncthreads();
            add(it, sums, scale);
            __syncthreads();
        }
        for (uint32_t i = lane; i < a.n; i += 32)
            a.h[(size_t)i * a.e.hidden + r * 16 + warp] = total[i * 16 + warp];
    }
}

tables tables_at(const de_cu_experts &e, uint32_t n, void *workspace, size_t *ret_bytes)
{
    const uint32_t n_items = items_max(n, e.top_k);
    de_cu_room room = { (uint8_t *)workspace, 0 };
    tables t;
    t.act_width = e.width > e.shared_width ? e.width : e.shared_width;
    t.n_items = room.take<uint32_t>(1);
    t.weight = room.take<float>((size_t)n * (e.top_k + 1));
    t.items = room.take<item>((size_t)n_items);
    t.act = room.take<bf16>((size_t)n * (e.top_k + 1) * t.act_width);
    *ret_bytes = room.used;
    return t;
}

template <int E, int S, int PER, int KT, int U, bool FUSED>
void launch_gate_up(cudaStream_t stream, const args &a, bool dependent)
{
    const size_t bytes = 2 * U * CU_SUMS + sizeof(routing) +
                         (sizeof(item) * items_max(a.n, a.e.top_k) + 15) / 16 * 16 +
                         (FUSED ? DE_CU_FUSED_ROWS * cu_x_stride(a.e.hidden) * sizeof(bf16) : 0);
    const uint32_t pieces = a.n * a.e.top_k * (a.e.width / 8) + a.e.shared_width / 8;
    cu_launch(gate_up_kernel<E, S, PER, KT, U, FUSED>, dim3(cu_blocks(pieces)), bytes, stream,
              dependent, a);
}

template <int E, int S> void launch(cudaStream_t stream, const args &a, bool dependent)
{
    const bool usual = a.e.n_experts <= 256 && a.e.hidden <= 2048;
    if (usual && a.x.ready)
        launch_gate_up<E, S, 8, 4, E == ANY ? 1 : 4, false>(stream, a, dependent);
    else if (usual)
        launch_gate_up<E, S, 8, 4, E == ANY ? 1 : 4, true>(stream, a, dependent);
    else if (a.x.ready)
        launch_gate_up<ANY, ANY, 32, 8, 1, false>(stream, a, dependent);
    else
        launch_gate_up<ANY, ANY, 32, 8, 1, true>(stream, a, dependent);
    const dim3 grid(cu_blocks(a.e.hidden / 16));
    const size_t tables = tables_bytes(a.n, a.e.top_k) + items_max(a.n, a.e.top_k) * sizeof(item);
    if (a.t.act_width <= 512 && a.n == 1)
        cu_launch(down_kernel<E, S, 1, 8, 1>, grid, 8 * CU_SUMS + tables, stream, dependent, a);
    else if (a.t.act_width <= 512)
        cu_launch(down_kernel<E, S, 1, 4, 2>, grid, 4 * CU_SUMS + tables, stream, dependent, a);
    else
        cu_launch(down_kernel<ANY, ANY, 4, 1, 1>, grid, CU_SUMS + tables, stream, dependent, a);
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
    const bool whole =
        e.gate_up.scale && e.gate_up.group == e.hidden && e.down.scale && e.down.group == e.width;
    if (whole && !e.shared_gate_up.scale && !e.shared_down.scale)
        launch<INT8, BF16>(stream, a, dependent);
    else
        launch<ANY, ANY>(stream, a, dependent);
}
