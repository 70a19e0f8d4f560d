/* tile_wgmma.cuh -- the product of a tile by wgmma (sm_90a): the shapes for any number of rows and the loop they share.
 *
 * A warpgroup makes MT times 64 outputs of BN rows. Weights are the A operand: they come by cp.async as they lie, and a lane's 16
 * bytes are, widened, its registers of m64k16 (warp w of the warpgroup has tile w of four). Rows of x are the B operand: rows of 128
 * bytes, K-major, whose 16-byte pieces are exchanged by piece ^ row % 8, which is the tensor core's 128-byte swizzle where a tile
 * begins at a multiple of 1,024 bytes; so any list of rows can be gathered by cp.async.
 *
 * While the products of one tile of columns run, the next one's weights are widened: two sets of A registers, at most one group of
 * wgmma in flight. So a stage is refilled two steps after it was read, and STAGES - 2 are on their way.
 *
 * Every sum is one chain of k16 steps in rising k, whatever BN, MT and the number of warpgroups: bits do not depend on the shape. */
#ifndef DE_KERNELS_CUDA_TILE_WGMMA_CUH
#define DE_KERNELS_CUDA_TILE_WGMMA_CUH

#include "kernels/cuda/common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DE_CU_HAS_WGMMA 1
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "sm_90 is built as 90a: its tiles need wgmma"
#else
#define DE_CU_HAS_WGMMA 0
#endif

namespace
{

/* WGS warpgroups of MT x 64 outputs x BN rows, BLOCKS of them an SM; 64 columns a stage. */
template <int WGS_, int MT_, int BN_, int BLOCKS_> struct wgmma_shape {
    static constexpr bool WGMMA = true;
    static constexpr int WGS = WGS_, MT = MT_, BN = BN_, BLOCKS = BLOCKS_;
    static constexpr int THREADS = WGS * 128, BM = WGS * MT * 64, LD = BM + 4, TILES = 2;
    static constexpr int b_bytes = BN * 128;
    template <bool INT8> __host__ __device__ static constexpr int a_bytes()
    {
        return BM / 16 * TILES * (INT8 ? 512 : 1024);
    }
    template <bool INT8> __host__ __device__ static constexpr int stages()
    {
        const int n = 220 * 1024 / BLOCKS / (a_bytes<INT8>() + b_bytes);
        return n < 12 ? n : 12;
    }
    template <bool INT8> __host__ __device__ static constexpr int shared_bytes()
    {
        const int in = stages<INT8>() * (a_bytes<INT8>() + b_bytes), out = BN * LD * 4;
        return in > out ? in : out;
    }
};

#if DE_CU_HAS_WGMMA

__device__ __forceinline__ void wgmma_fence() /* before wgmma reads registers others wrote */
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* B: rows of 128 bytes, 8 of them 1,024 bytes, 128-byte swizzle. */
__device__ __forceinline__ uint64_t wgmma_rows(const void *shared)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | 1u << 16 | (at & 0x3FFFF) >> 4;
}

#define D8(d, i)                                                                                   \
    "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3]), "+f"((d)[i + 4]),          \
        "+f"((d)[i + 5]), "+f"((d)[i + 6]), "+f"((d)[i + 7])
#define D32(d, i) D8(d, i), D8(d, i + 8), D8(d, i + 16), D8(d, i + 24)
#define R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define R16 R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define R32 R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R48 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define R64 R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define R96                                                                                        \
    R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,"    \
        "%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define R128                                                                                       \
    R96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,"  \
        "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA(N, D, A, B, P, ...)                                                                  \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0;"                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" D "}, {" A "}, " B   \
                 ", p, 1, 1, 0;}"                                                                  \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

/* d = a b, or d += a b if add is not 0: a 64 x 16 in registers, b N rows of x. d[4 j + e]: output lane / 4 + e / 2 * 8 of the warp's
 * 16, row 8 j + lane % 4 * 2 + e % 2, as mma.sync has it. */
template <int N>
__device__ __forceinline__ void wgmma(float d[N / 2], const uint32_t a[4], uint64_t b, uint32_t add)
{
    static_assert(N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 256,
                  "no such wgmma");
    if constexpr (N == 16)
        WGMMA(16, R8, "%8,%9,%10,%11", "%12", "%13", D8(d, 0));
    else if constexpr (N == 32)
        WGMMA(32, R16, "%16,%17,%18,%19", "%20", "%21", D8(d, 0), D8(d, 8));
    else if constexpr (N == 64)
        WGMMA(64, R32, "%32,%33,%34,%35", "%36", "%37", D32(d, 0));
    else if constexpr (N == 96)
        WGMMA(96, R48, "%48,%49,%50,%51", "%52", "%53", D32(d, 0), D8(d, 32), D8(d, 40));
    else if constexpr (N == 128)
        WGMMA(128, R64, "%64,%65,%66,%67", "%68", "%69", D32(d, 0), D32(d, 32));
    else
        WGMMA(256, R128, "%128,%129,%130,%131", "%132", "%133", D32(d, 0), D32(d, 32), D32(d, 64),
              D32(d, 96));
}
#undef WGMMA
#undef D8
#undef D32
#undef R8
#undef R16
#undef R32
#undef R48
#undef R64
#undef R96
#undef R128

/* out [BN][LD] float in shared memory = rows of x times W, unscaled. row_of(i): where row i of the tile begins, or NULL. `shared`
 * lies at a multiple of 1,024. Ends with a barrier. */
template <class S, bool INT8, class F>
__device__ __forceinline__ float *wgmma_product(const de_cu_linear &w, uint32_t tile0, F row_of,
                                                char *shared)
{
    constexpr int A = S::template a_bytes<INT8>(), B = S::b_bytes, TILE = INT8 ? 512 : 1024;
    constexpr int STAGES = S::template stages<INT8>();
    static_assert(STAGES >= 4 && A % 1024 == 0 && B % 1024 == 0, "stages");
    /* A: 16 bytes of every A_ROWS-th row of tiles; B: a piece of every B_ROWS-th row of x */
    constexpr int A_ROWS = S::THREADS * 16 / (2 * TILE), A_N = S::BM / 16 / A_ROWS,
                  B_ROWS = S::THREADS / 8, B_N = S::BN / B_ROWS;
    static_assert(A_N * A_ROWS == S::BM / 16 && B_N * B_ROWS == S::BN, "a thread's copies");
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t tiles = w.in / 32, n_rows = (w.out + 15) / 16, steps = (tiles + 1) / 2;

    const uint32_t a_part = threadIdx.x * 16 % (2 * TILE), a_row = threadIdx.x * 16 / (2 * TILE);
    const uint8_t *a_from = w.w + (size_t)(tile0 + a_row) * tiles * TILE + a_part;
    const uint32_t b_piece = threadIdx.x % 8, b_row = threadIdx.x / 8;
    const uint32_t b_to = b_row * 128 + (b_piece ^ b_row % 8) * 16;
    const bf16 *rows[B_N];
#pragma unroll
    for (int i = 0; i < B_N; i++)
        rows[i] = row_of(b_row + B_ROWS * i);
    uint32_t fetched = 0;
    char *to = shared;
    auto fetch = [&]() {
        if (fetched < steps) {
            const bool column = fetched * 2 + a_part / TILE < tiles;
#pragma unroll
            for (int i = 0; i < A_N; i++) {
                const bool has = column && tile0 + a_row + i * A_ROWS < n_rows;
                cu_copy16(to + (i * S::THREADS + threadIdx.x) * 16,
                          has ? a_from + (size_t)(i * A_ROWS) * tiles * TILE : w.w, has);
            }
            a_from += 2 * TILE;
            const uint32_t k = fetched * 64 + b_piece * 8;
#pragma unroll
            for (int i = 0; i < B_N; i++) {
                const bool has = rows[i] && k < w.in;
                cu_copy16(to + A + b_to + i * B_ROWS * 128, has ? rows[i] + k : (const bf16 *)w.w,
                          has);
            }
            fetched++;
            to = to + A + B == shared + STAGES * (A + B) ? shared : to + A + B;
        }
        cu_copies_commit();
    };

    /* Not set to zero: the first wgmma writes it. Other instructions' writes would make ptxas wait for each wgmma (C7515). */
    float acc[S::MT][S::BN / 2];
#pragma unroll
    for (int i = 0; i < STAGES - 2; i++)
        fetch();
    const char *stage = shared;
    for (uint32_t step = 0; step < steps; step++) {
        cu_copies_wait<STAGES - 3>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); /* wgmma will read them */
        __syncthreads(); /* all copies of this stage are there; all are done with that of two steps ago */
        fetch();
        const char *a = stage + (warp / 4 * S::MT * 4 + warp % 4) * 2 * TILE + lane * 16;
        const uint64_t b = wgmma_rows(stage + A);
        uint32_t fa[2][S::MT][2][4];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            wgmma_wait<1>(); /* fa[c] is free */
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                const char *at = a + (m * 8 + c) * TILE;
                if (INT8) {
                    cu_widen_tile(*(const uint4 *)at, fa[c][m]);
                } else {
                    cu_bf16_tile(*(const uint4 *)at, *(const uint4 *)(at + 512), fa[c][m]);
                }
            }
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 2; k++)
#pragma unroll
                for (int m = 0; m < S::MT; m++)
                    wgmma<S::BN>(acc[m], fa[c][m][k], b + (c * 2 + k) * (32 >> 4), c || k || step);
            wgmma_commit();
        }
        stage = stage + A + B == shared + STAGES * (A + B) ? shared : stage + A + B;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int i = 0; i < S::BN / 2; i++)
            asm volatile("" : "+f"(acc[m][i])::"memory");
    cu_copies_wait<0>();
    __syncthreads(); /* the stages are free */
    float *out = (float *)shared;
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int i = 0; i < S::BN / 2; i++)
            out[(i / 4 * 8 + lane % 4 * 2 + i % 2) * S::LD + (warp / 4 * S::MT + m) * 64 +
                warp % 4 * 16 + lane / 4 + i % 4 / 2 * 8] = acc[m][i];
    __syncthreads();
    return out;
}

#endif

} // namespace

#endif
