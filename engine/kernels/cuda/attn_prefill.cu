/* attn_prefill.cu -- causal attention of many rows over paged keys and values.
 *
 * First every row's queries are normed, turned and kept, its key and value go to their page. Then a block has 128 (row, query head)
 * pairs of one KV head, neighbours in the sequence with all heads of the KV head. Two of its warpgroups have 64 pairs each and go
 * over the pages; a third one brings the pages, widened once for both, through a ring of shared memory (K of a page and V of a page
 * take a stage each). On sm_90a the products are wgmma, elsewhere mma.sync on the same shared memory with the same registers.
 *
 * The keys are cut at the multiples of PART, whatever the rows. A part has its own maximum and sum, over its pages in order; parts are
 * added in rising order, each sum being scaled to the larger maximum (folded()). What is computed for a row thus depends on its position,
 * its query and the keys and values up to it: not on how its prompt was cut into forwards, nor on the batch. Who computes which part
 * does not matter then, and may depend on anything:
 *   enough rows   a block takes all parts of its pairs and keeps what is added up in a slot of the workspace while it makes the next
 *   few rows      a block takes one part; merge_kernel adds them, in rounds of as many parts as there are slots for */
#include "kernels/cuda/attn.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA 1
#else
#define WGMMA 0
#endif

namespace
{

enum {
    ROWS = 128,
    GROUP = 128, /* threads of a warpgroup */
    THREADS = 3 * GROUP,
    STAGE = A_P * A_D * 2, /* bytes of K or V of a page, widened */
    PART = 2048,           /* keys */
    PART_PAGES = PART / A_P,
    SLOTS = 1056, /* in the workspace; more than blocks ever run at once */
    BATCH = 8,    /* loads of 16 bytes a thread that fetches has under way */
};

/* Of 128 pairs, as the threads of the two warpgroups hold it: fragments of 8 dims, (row g, dims 2t, 2t + 1), (row g + 8, the same). */
struct slot_sums {
    float4 o[2][A_D / 8][GROUP];
    float2 top[ROWS]; /* maximum and sum */
};

/* Stages of the ring: what fits. */
__host__ __device__ constexpr int ring_stages(int major)
{
    return major >= 9 ? 4 : 3;
}
constexpr int shared_bytes(int stages)
{
    return 1024 + ROWS * A_D * 2 + stages * STAGE; /* the first to align the others to it */
}

template <bool FP8>
__global__ void __launch_bounds__(256)
    rows_kernel(const de_cu_attn a, const bf16 *p, size_t ldp, const float *rope,
                const de_cu_seq *seqs, const uint32_t *pages, uint32_t n_seqs, uint32_t rows,
                uint16_t *q, uint32_t *taken)
{
    __shared__ float swap[8][A_D];
    const uint32_t heads = a.q_heads + a.kv_heads, at = blockIdx.x * 8 + threadIdx.x / 32,
                   row = at / heads, head = at % heads, lane = threadIdx.x % 32;
    if (blockIdx.x == 0)
        for (uint32_t i = threadIdx.x; i < SLOTS; i += 256)
            taken[i] = 0;
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

/* ---- barriers in shared memory, and named ones */

__device__ __forceinline__ uint32_t shared_at(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void barrier_init(uint64_t *b, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_at(b)), "r"(arrivals)
                 : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *b, uint32_t parity)
{
    uint32_t done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_at(b)), "r"(parity)
                     : "memory");
#else
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_at(b)), "r"(parity)
                     : "memory");
#endif
    } while (!done);
}
/* What this warp did before is seen by who waits; one arrival a warp. */
__device__ __forceinline__ void barrier_arrive(uint64_t *b)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        asm volatile("{\n.reg .b64 s;\nmbarrier.arrive.shared.b64 s, [%0];\n}" ::"r"(shared_at(b))
                     : "memory");
}
__device__ __forceinline__ void threads_meet(uint32_t name, uint32_t n)
{
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(n) : "memory");
}
/* Ordinary stores before it are seen by wgmma behind the next barrier. */
__device__ __forceinline__ void stores_for_wgmma()
{
#if WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* ---- products of a warpgroup
 *
 * Operands lie in rows of 128 bytes (64 values along the summed index), eight rows to 1,024 bytes, the 16-byte piece c of row r at
 * c ^ r % 8: the swizzle of 128 bytes that wgmma's descriptors name, and free of bank conflicts for ldmatrix. */

#if WGMMA
__device__ __forceinline__ uint64_t descriptor(const char *p)
{
    return (shared_at(p) & 0x3FFFF) >> 4 | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}
template <int N> __device__ __forceinline__ void keep_order(float (*d)[4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+f"(d[i][e])::"memory");
}
#define F4(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define F16(d) F4((d)[0]), F4((d)[1]), F4((d)[2]), F4((d)[3])
#define SCORES(type)                                                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                   \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "     \
                 "%31}, %32, %33, p, 1, 1, 0, 0;\n}"                                               \
                 : F16(d), F16(d + 4)                                                              \
                 : "l"(a), "l"(b), "r"(c))
#define OUTPUT(type)                                                                               \
    asm volatile(                                                                                  \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " "                           \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "         \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "         \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "         \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "         \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "         \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "         \
        "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "           \
        "%123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"               \
        : F16(d), F16(d + 4), F16(d + 8), F16(d + 12), F16(d + 16), F16(d + 20), F16(d + 24),      \
          F16(d + 28)                                                                              \
        : "r"(x[e][0]), "r"(x[e][1]), "r"(x[e][2]), "r"(x[e][3]), "l"(b))
#endif

/* d = Q K': 64 pairs of q by the 64 tokens of a page; both in four pieces of 64 dims. Runs on until scores_ready(). */
template <bool FP8>
__device__ __forceinline__ void start_scores(float d[A_P / 8][4], const char *q, const char *k)
{
#if WGMMA
    const uint64_t a0 = descriptor(q), b0 = descriptor(k);
    keep_order<A_P / 8>(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int c = 0; c < A_D / 16; c++) {
        const uint64_t a = a0 + c / 4 * 512 + c % 4 * 2, b = b0 + c / 4 * 512 + c % 4 * 2;
        if (FP8)
            SCORES("f16");
        else
            SCORES("bf16");
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    keep_order<A_P / 8>(d);
#else
    const uint32_t lane = threadIdx.x % 32, row = threadIdx.x % GROUP / 32 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < A_P / 8; j++)
        d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0;
#pragma unroll 4
    for (int c = 0; c < A_D / 16; c++) {
        uint32_t a[4], b[4];
        cu_ldmatrix(a, q + c / 4 * 8192 + row * 128 + ((c % 4 * 2 + lane / 16) ^ row % 8) * 16);
#pragma unroll
        for (int j = 0; j < A_P / 16; j++) {
            cu_ldmatrix(b, k + c / 4 * 8192 + (j * 16 + lane / 16 * 8 + lane % 8) * 128 +
                               ((c % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16);
            kv_format<FP8>::mma(d[2 * j], a, b[0], b[1]);
            kv_format<FP8>::mma(d[2 * j + 1], a, b[2], b[3]);
        }
    }
#endif
}
/* d += P V: probabilities by 256 dims, v as V' of a page. */
template <bool FP8>
__device__ __forceinline__ void start_output(float d[A_D / 8][4], const uint32_t x[A_P / 16][4],
                                             const char *v)
{
#if WGMMA
    const uint64_t b0 = descriptor(v);
    keep_order<A_D / 8>(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int e = 0; e < A_P / 16; e++) {
        const uint64_t b = b0 + e * 2;
        if (FP8)
            OUTPUT("f16");
        else
            OUTPUT("bf16");
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < A_P / 16; e++)
#pragma unroll
        for (int i = 0; i < A_D / 16; i++) {
            uint32_t b[4];
            cu_ldmatrix(b, v + (i * 16 + lane / 16 * 8 + lane % 8) * 128 +
                               ((e * 2 + lane / 8 % 2) ^ lane % 8) * 16);
            kv_format<FP8>::mma(d[2 * i], x[e], b[0], b[1]);
            kv_format<FP8>::mma(d[2 * i + 1], x[e], b[2], b[3]);
        }
#endif
}
/* All but the newest LEFT products are done. */
template <int LEFT> __device__ __forceinline__ void products_wait()
{
#if WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}
template <int N> __device__ __forceinline__ void products_ready(float (*d)[4])
{
#if WGMMA
    keep_order<N>(d);
#endif
}

/* ---- parts */

__device__ __forceinline__ float exp2_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* A part y behind a total x. */
__device__ __forceinline__ float folded(float x, float fade_x, float y, float fade_y)
{
    return __fmaf_rn(x, fade_x, __fmul_rn(y, fade_y));
}
__device__ __forceinline__ float4 folded(float4 x, const float fade_x[2], float4 y,
                                         const float fade_y[2])
{
    return make_float4(
        folded(x.x, fade_x[0], y.x, fade_y[0]), folded(x.y, fade_x[0], y.y, fade_y[0]),
        folded(x.z, fade_x[1], y.z, fade_y[1]), folded(x.w, fade_x[1], y.w, fade_y[1]));
}
/* Maximum and sum of a row: total += part, with the factors of both. A part without a key for this row has the maximum -infinity and
 * changes nothing; a total has one. */
__device__ __forceinline__ void fold_top(float2 &total, float2 part, float &fade_total,
                                         float &fade_part)
{
    const float max = fmaxf(total.x, part.x);
    fade_total = exp2_of(total.x - max);
    fade_part = exp2_of(part.x - max);
    total = make_float2(max, folded(total.y, fade_total, part.y, fade_part));
}
/* Two dims of a row and query head, over the sum and gated. */
__device__ __forceinline__ void put_y(const de_cu_attn &a, const bf16 *p, size_t ldp, size_t row,
                                      uint32_t head, uint32_t d, float lo, float hi, float one,
                                      bf16 *y)
{
    const uint32_t z = *(const uint32_t *)(p + row * ldp + ((size_t)head * 2 + 1) * A_D + d);
    *(uint32_t *)(y + (row * a.q_heads + head) * A_D + d) =
        cu_pack(lo * one * cu_sigmoid(cu_lo(z)), hi * one * cu_sigmoid(cu_hi(z)));
}

/* What a block of attend_kernel and one of merge_kernel have to do. parts 0: a block has all parts of its pairs; else the parts
 * [part0, part0 + parts) of each 128 pairs are blocks of their own. */
struct split {
    uint32_t tiles, part0, parts, stride; /* stride: slots of 128 pairs */
};
struct tile_of {
    uint32_t per, head0, first, n_tokens, end; /* end: behind its last position */
    bool any;
    __device__ __forceinline__ tile_of(const de_cu_attn &a, const de_cu_seq &s, uint32_t kv_head,
                                       uint32_t tile)
    {
        per = a.q_heads / a.kv_heads;
        head0 = kv_head * per;
        first = tile * (ROWS / per);
        any = first < s.n_rows;
        n_tokens = any ? min(ROWS / per, s.n_rows - first) : 0;
        end = s.start + first + n_tokens;
    }
};

/* ---- the warpgroup that brings pages */

/* Pages [page, end) of a KV head, K and V in turn into the ring. Loads of the next 16 kB are under way while the last are stored. */
template <bool FP8, int RING>
__device__ __forceinline__ void bring_pages(const de_cu_attn &a, const uint32_t *pages,
                                            uint32_t kv_head, uint32_t page, uint32_t end,
                                            char *ring, uint64_t *full, uint64_t *empty)
{
    constexpr uint32_t EACH = kv_format<FP8>::SIZE, BYTES = BATCH * 16 * GROUP; /* a batch */
    static_assert(BYTES * EACH == A_P * A_D * EACH, "batches of K or V");
    const uint32_t me = threadIdx.x % GROUP, n = (end - page) * 2 * EACH;
    auto load = [&](uint32_t b, uint4 *to) {
        if (b >= n)
            return;
        const uint8_t *from = a.kv + pages[page + b / (2 * EACH)] * a.page_bytes +
                              (size_t)kv_head * 2 * EACH * BYTES + b % (2 * EACH) * BYTES + me * 16;
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            to[i] = __ldcg((const uint4 *)(from + i * GROUP * 16));
    };
    auto put = [&](uint32_t b, const uint4 *v) {
        const uint32_t item = b / EACH, stage = item % RING, is_v = item % 2, half = b % EACH;
        char *to = ring + stage * STAGE;
        if (half == 0)
            barrier_wait(&empty[stage], item / RING % 2 ^ 1);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const uint32_t c = half * BATCH * GROUP + i * GROUP + me;
            if (FP8) { /* 16 values to two pieces; the order of the two keeps banks apart */
                const uint32_t row = is_v ? c / 4 : c / 16, column = is_v ? c % 4 : c % 16,
                               odd = column / 4 % 2, piece = column % 4 * 2 + odd;
                char *at = to + column / 4 * 8192 + row * 128;
                uint32_t w[8];
                kv_format<FP8>::widen(v[i], w);
                const uint4 lo = make_uint4(w[0], w[1], w[2], w[3]),
                            hi = make_uint4(w[4], w[5], w[6], w[7]);
                *(uint4 *)(at + (piece ^ row % 8) * 16) = odd ? hi : lo;
                *(uint4 *)(at + (piece ^ 1 ^ row % 8) * 16) = odd ? lo : hi;
            } else {
                const uint32_t row = is_v ? c / 8 : c / 32, column = is_v ? c % 8 : c % 32;
                *(uint4 *)(to + column / 8 * 8192 + row * 128 + (column % 8 ^ row % 8) * 16) = v[i];
            }
        }
        if (half == EACH - 1) {
            stores_for_wgmma();
            barrier_arrive(&full[stage]);
        }
    };
    uint4 v[2][BATCH];
    load(0, v[0]);
#pragma unroll 1
    for (uint32_t b = 0; b < n; b += 2) { /* n is even */
        load(b + 1, v[1]);
        put(b, v[0]);
        load(b + 2, v[0]);
        put(b + 1, v[1]);
    }
}

/* ---- the block */

/* Bytes of a page from memory once a block; 8.4 MFLOP a page, 2,048 clocks of an SM's tensor cores, of which the loads of both operands
 * from shared memory take as many. 512 clocks of exponentials run beside the other warpgroup's products. */
template <bool FP8>
__global__ void __launch_bounds__(THREADS, 1)
    attend_kernel(const de_cu_attn a, const bf16 *p, size_t ldp, const de_cu_seq *seqs,
                  const uint32_t *pages, const uint16_t *q, const split how, slot_sums *slots,
                  uint32_t *taken, bf16 *y)
{
    typedef kv_format<FP8> F;
#if defined(__CUDA_ARCH__)
    constexpr int RING = ring_stages(__CUDA_ARCH__ / 100);
#else
    constexpr int RING = 3;
#endif
    extern __shared__ char unaligned[];
    __shared__ uint64_t full[4], empty[4];
    __shared__ uint32_t my_slot;
    char *const qs = unaligned + (1024 - shared_at(unaligned) % 1024) % 1024, *const ring =
                                                                                  qs +
                                                                                  ROWS * A_D * 2;
    const de_cu_seq s = seqs[blockIdx.z];
    const uint32_t part = how.parts ? how.part0 + blockIdx.x / how.tiles : 0,
                   tile = how.tiles - 1 - blockIdx.x % how.tiles; /* longest first */
    const tile_of w(a, s, blockIdx.y, tile);
    const uint32_t end_page = how.parts ? min((part + 1) * PART_PAGES, (w.end + A_P - 1) / A_P)
                                        : (w.end + A_P - 1) / A_P,
                   first_page = part * PART_PAGES;
    if (!w.any || first_page >= end_page)
        return;
    const bool several = w.end > PART, walks = several && !how.parts;
    if (threadIdx.x == 0) {
        for (int i = 0; i < RING; i++) {
            barrier_init(&full[i], GROUP / 32);
            barrier_init(&empty[i], 2 * GROUP / 32);
        }
        uint32_t slot = 0;
        if (walks) { /* blocks at once are fewer than slots */
            slot = (blockIdx.x + blockIdx.y * 64) % SLOTS;
            while (atomicExch(&taken[slot], 1))
                slot = (slot + 1) % SLOTS;
            __threadfence();
        } else if (several) {
            slot = ((blockIdx.z * gridDim.y + blockIdx.y) * how.tiles + tile) * how.stride + part -
                   how.part0;
        }
        my_slot = slot;
    }
    __syncthreads(); /* the barriers and my_slot */
    pages += s.page0;
    const uint32_t group = threadIdx.x / GROUP;
    if (group == 2) {
#if WGMMA
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
#endif
        bring_pages<FP8, RING>(a, pages, blockIdx.y, first_page, end_page, ring, full, empty);
        return;
    }
#if WGMMA
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
#endif
    const uint32_t me = threadIdx.x % GROUP, lane = me % 32, g = lane / 4, t = lane % 4,
                   r0 = group * 64 + me / 32 * 16 + g;
    char *const mine = qs + group * 64 * A_D * 2;
#pragma unroll 8
    for (uint32_t c = me; c < 64 * (A_D / 8); c += GROUP) {
        const uint32_t r = c / (A_D / 8), piece = c % (A_D / 8), pair = group * 64 + r;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (pair < w.n_tokens * w.per)
            v = *(const uint4 *)(q +
                                 ((size_t)(s.row + w.first + pair / w.per) * a.q_heads + w.head0 +
                                  pair % w.per) *
                                     A_D +
                                 piece * 8);
        *(uint4 *)(mine + piece / 8 * 8192 + r * 128 + (piece % 8 ^ r % 8) * 16) = v;
    }
    stores_for_wgmma();
    threads_meet(1 + group, GROUP); /* this warpgroup's queries */
    slot_sums &slot = slots[my_slot];
    const uint32_t pos[2] = { s.start + w.first + r0 / w.per,
                              s.start + w.first + (r0 + 8) / w.per };
    float o[A_D / 8][4], sc[A_P / 8][4], max[2] = { -INFINITY, -INFINITY }, sum[2] = { 0, 0 };
    float2 total[2] = { { -INFINITY, 0 }, { -INFINITY, 0 } };
#pragma unroll
    for (int i = 0; i < A_D / 8; i++)
        o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
    uint32_t item = 0;
    barrier_wait(&full[0], 0);
    start_scores<FP8>(sc, mine, ring);
    products_wait<0>();
    products_ready<A_P / 8>(sc);
    barrier_arrive(&empty[0]);
#pragma unroll 1
    for (uint32_t page = first_page; page < end_page; page++) {
        if ((page + 1) * A_P > s.start + w.first) /* not all rows see all of it */
#pragma unroll
            for (int j = 0; j < A_P / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (page * A_P + j * 8 + 2 * t + e % 2 > pos[e / 2])
                        sc[j][e] = -INFINITY;
        float fade[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = max[r];
#pragma unroll
            for (int j = 0; j < A_P / 8; j++)
                top = fmaxf(top, fmaxf(sc[j][2 * r], sc[j][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            /* a row that sees nothing of this part: all factors are 0 */
            const float base = top == -INFINITY ? 0 : top;
            fade[r] = exp2_of(max[r] - base);
            max[r] = top;
            sum[r] *= fade[r];
#pragma unroll
            for (int j = 0; j < A_P / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    sc[j][2 * r + e] = exp2_of(sc[j][2 * r + e] - base);
                    sum[r] += sc[j][2 * r + e];
                }
        }
        if (__any_sync(~0u, fade[0] != 1 || fade[1] != 1))
#pragma unroll
            for (int i = 0; i < A_D / 8; i++) {
                o[i][0] *= fade[0], o[i][1] *= fade[0];
                o[i][2] *= fade[1], o[i][3] *= fade[1];
            }
        uint32_t x[A_P / 16][4];
#pragma unroll
        for (int e = 0; e < A_P / 16; e++) {
            x[e][0] = F::pair(sc[2 * e][0], sc[2 * e][1]);
            x[e][1] = F::pair(sc[2 * e][2], sc[2 * e][3]);
            x[e][2] = F::pair(sc[2 * e + 1][0], sc[2 * e + 1][1]);
            x[e][3] = F::pair(sc[2 * e + 1][2], sc[2 * e + 1][3]);
        }
        const uint32_t v_stage = (item + 1) % RING, k_stage = (item + 2) % RING;
        barrier_wait(&full[v_stage], (item + 1) / RING % 2);
        start_output<FP8>(o, x, ring + v_stage * STAGE);
        if (page + 1 < end_page) {
            barrier_wait(&full[k_stage], (item + 2) / RING % 2);
            start_scores<FP8>(sc, mine, ring + k_stage * STAGE);
            products_wait<1>();
            products_ready<A_D / 8>(o);
            barrier_arrive(&empty[v_stage]);
            products_wait<0>();
            products_ready<A_P / 8>(sc);
            barrier_arrive(&empty[k_stage]);
            item += 2;
            if ((page + 1) % PART_PAGES)
                continue;
        }
        products_wait<0>();
        products_ready<A_D / 8>(o);
        /* the end of a part */
        float fade_total[2], fade_part[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
            if (page < PART_PAGES || how.parts)
                total[r] = make_float2(max[r], sum[r]);
            else
                fold_top(total[r], make_float2(max[r], sum[r]), fade_total[r], fade_part[r]);
            max[r] = -INFINITY;
            sum[r] = 0;
        }
        const bool last = page + 1 == end_page;
        if (page >= PART_PAGES && !how.parts)
#pragma unroll
            for (int i = 0; i < A_D / 8; i++) {
                const float4 v = folded(slot.o[group][i][me], fade_total,
                                        make_float4(o[i][0], o[i][1], o[i][2], o[i][3]), fade_part);
                o[i][0] = v.x, o[i][1] = v.y, o[i][2] = v.z, o[i][3] = v.w;
                if (i % 4 == 3) /* four loads at once: there are no registers for more */
                    asm volatile("" ::: "memory");
            }
        if (!last || (several && how.parts)) {
#pragma unroll
            for (int i = 0; i < A_D / 8; i++) {
                slot.o[group][i][me] = make_float4(o[i][0], o[i][1], o[i][2], o[i][3]);
                o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
            }
            if (how.parts && t == 0) {
                slot.top[r0] = total[0];
                slot.top[r0 + 8] = total[1];
            }
            continue;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t at = r0 + 8 * r;
            if (at >= w.n_tokens * w.per)
                continue;
            const float one = 1 / total[r].y;
#pragma unroll
            for (int i = 0; i < A_D / 8; i++)
                put_y(a, p, ldp, s.row + w.first + at / w.per, w.head0 + at % w.per, i * 8 + 2 * t,
                      o[i][2 * r], o[i][2 * r + 1], one, y);
        }
    }
    if (walks) {
        threads_meet(3, 2 * GROUP); /* nobody needs the slot any more */
        if (threadIdx.x == 0) {
            __threadfence();
            atomicExch(&taken[my_slot], 0);
        }
    }
}

/* A block: half of 128 pairs, 16 dims of them, as the threads of attend_kernel hold them; adds what is in their slots. */
enum { MERGED = 2 };
__global__ void __launch_bounds__(GROUP)
    merge_kernel(const de_cu_attn a, const bf16 *p, size_t ldp, const de_cu_seq *seqs,
                 const split how, slot_sums *slots, bf16 *y)
{
    const uint32_t group = blockIdx.x % 2, i0 = blockIdx.x / 2 % (A_D / 8 / MERGED) * MERGED,
                   tile = blockIdx.x / (2 * (A_D / 8 / MERGED)), me = threadIdx.x, lane = me % 32,
                   g = lane / 4, t = lane % 4, r0 = group * 64 + me / 32 * 16 + g;
    const de_cu_seq s = seqs[blockIdx.z];
    const tile_of w(a, s, blockIdx.y, tile);
    const uint32_t parts = (w.end + PART - 1) / PART, end = min(parts, how.part0 + how.parts);
    if (!w.any || parts < 2 || how.part0 >= parts)
        return;
    slots += (size_t)((blockIdx.z * gridDim.y + blockIdx.y) * how.tiles + tile) * how.stride;
    slot_sums *const kept = slots + how.parts; /* of the rounds before, in a slot of its own */
    const slot_sums *from = how.part0 ? kept : slots;
    float2 total[2] = { from->top[r0], from->top[r0 + 8] };
    float4 o[MERGED];
#pragma unroll
    for (int i = 0; i < MERGED; i++)
        o[i] = from->o[group][i0 + i][me];
#pragma unroll 4
    for (uint32_t k = how.part0 ? 0 : 1; k < end - how.part0; k++) {
        float fade_total[2], fade_part[2];
#pragma unroll
        for (int r = 0; r < 2; r++)
            fold_top(total[r], slots[k].top[r0 + 8 * r], fade_total[r], fade_part[r]);
#pragma unroll
        for (int i = 0; i < MERGED; i++)
            o[i] = folded(o[i], fade_total, slots[k].o[group][i0 + i][me], fade_part);
    }
    if (end < parts) {
#pragma unroll
        for (int i = 0; i < MERGED; i++)
            kept->o[group][i0 + i][me] = o[i];
        if (i0 == 0 && t == 0) {
            kept->top[r0] = total[0];
            kept->top[r0 + 8] = total[1];
        }
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t at = r0 + 8 * r;
        if (at >= w.n_tokens * w.per)
            continue;
#pragma unroll
        for (int i = 0; i < MERGED; i++)
            put_y(a, p, ldp, s.row + w.first + at / w.per, w.head0 + at % w.per,
                  (i0 + i) * 8 + 2 * t, r ? o[i].z : o[i].x, r ? o[i].w : o[i].y, 1 / total[r].y,
                  y);
    }
}

/* ---- host */

struct workspace_of {
    uint16_t *q;
    uint32_t *taken;
    slot_sums *slots;
    size_t bytes;
    workspace_of(const de_cu_attn &a, uint32_t rows, void *base)
    {
        de_cu_room room = { (uint8_t *)base, 0 };
        q = room.take<uint16_t>((size_t)rows * a.q_heads * A_D);
        taken = room.take<uint32_t>(SLOTS);
        slots = room.take<slot_sums>(SLOTS);
        bytes = room.used;
    }
};

/* True if blocks that take all parts of their pairs would leave more than an eighth of the card idle. */
bool worth_splitting(uint32_t blocks)
{
    const uint32_t sms = cu_multiprocessors(), waves = (blocks + sms - 1) / sms;
    return blocks * 8 < waves * sms * 7;
}

template <bool FP8>
void launch(cudaStream_t stream, const de_cu_attn &a, const bf16 *p, size_t ldp, const float *rope,
            const de_cu_seq *seqs, const uint32_t *pages, uint32_t n_seqs, uint32_t rows,
            uint32_t max_rows, uint32_t ctx_max, bf16 *y, void *workspace)
{
    const workspace_of w(a, rows, workspace);
    const uint32_t work = rows * (a.q_heads + a.kv_heads), tokens = ROWS / (a.q_heads / a.kv_heads);
    rows_kernel<FP8><<<(work + 7) / 8, 256, 0, stream>>>(a, p, ldp, rope, seqs, pages, n_seqs, rows,
                                                         w.q, w.taken);
    const uint32_t parts = (ctx_max + PART - 1) / PART, tiles = (max_rows + tokens - 1) / tokens,
                   most = tiles * a.kv_heads * n_seqs,
                   likely = (rows / tokens + n_seqs) * a.kv_heads;
    auto attend = [&](const split &how, uint32_t n) {
        cu_launch_threads(attend_kernel<FP8>, dim3(tiles * n, a.kv_heads, n_seqs), THREADS,
                          shared_bytes(ring_stages(cu_major())), stream, false, a, p, ldp, seqs,
                          pages, (const uint16_t *)w.q, how, w.slots, w.taken, y);
    };
    if (parts < 2 || most > SLOTS / 3 || !worth_splitting(likely < most ? likely : most)) {
        attend({ tiles, 0, 0, 0 }, 1);
        return;
    }
    const uint32_t room = SLOTS / most, each = parts <= room ? parts : room - 1,
                   stride = parts <= room ? parts : room;
    for (uint32_t part = 0; part < parts; part += each) {
        const split how = { tiles, part, each, stride };
        attend(how, parts - part < each ? parts - part : each);
        merge_kernel<<<dim3(tiles * 2 * (A_D / 8 / MERGED), a.kv_heads, n_seqs), GROUP, 0,
                       stream>>>(a, p, ldp, seqs, how, w.slots, y);
    }
}

} // namespace

size_t de_cu_attn_prefill_bytes(const de_cu_attn &a, uint32_t rows)
{
    return workspace_of(a, rows, NULL).bytes;
}

void de_cu_attn_prefill(cudaStream_t stream, const de_cu_attn &a, const bf16 *p, size_t ldp,
                        const float *rope, const de_cu_seq *seqs, const uint32_t *pages,
                        uint32_t n_seqs, uint32_t rows, uint32_t max_rows, uint32_t ctx_max,
                        bf16 *y, void *workspace)
{
    if (a.kv_type == DE_CU_KV_FP8)
        launch<true>(stream, a, p, ldp, rope, seqs, pages, n_seqs, rows, max_rows, ctx_max, y,
                     workspace);
    else
        launch<false>(stream, a, p, ldp, rope, seqs, pages, n_seqs, rows, max_rows, ctx_max, y,
                      workspace);
}
