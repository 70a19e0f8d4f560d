/* tile.cuh -- matrices times many rows: tiles of outputs x rows on tensor cores, for one matrix or one for each expert.
 *
 * A block makes BM outputs of BN rows; results go through shared memory, so that rows are written whole. Two instructions: wgmma
 * (tile_wgmma.cuh) on sm_90a for matrices with at most one scale a row, else mma.sync (here): for those with scale groups, which
 * are rare, and before sm_90. The matrix and the device choose, never the number of rows, and every sum is one chain in rising k
 * whatever the tile: bits of a row do not depend on the others.
 *
 * mma.sync: weights are the A operand, already in the order of fragments, so that a warp reads them from shared memory as they came;
 * rows of x are the B operand, in rows of 128 bytes with their 16-byte pieces exchanged (piece ^ row % 8) so that ldmatrix meets no
 * bank twice. Both come by cp.async, STAGES deep. */
#ifndef DE_KERNELS_CUDA_TILE_CUH
#define DE_KERNELS_CUDA_TILE_CUH

#include <type_traits>

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/tile_wgmma.cuh"

namespace
{

enum { T_WARPS = 8, T_THREADS = T_WARPS * 32, T_TILES = 2 /* of 32 columns a stage */ };

/* WM x WN warps of MT x NT fragments. */
template <int WM_, int WN_, int MT_, int NT_, int STAGES_> struct tile_shape {
    static constexpr bool WGMMA = false;
    static constexpr int THREADS = T_THREADS, BLOCKS = 1;
    static constexpr int WM = WM_, WN = WN_, MT = MT_, NT = NT_, STAGES = STAGES_;
    static constexpr int BM = WM * MT * 16, BN = WN * NT * 8, LD = BM + 4;
    template <bool INT8> __host__ __device__ static constexpr int a_bytes()
    {
        return BM / 16 * T_TILES * (INT8 ? 512 : 1024);
    }
    static constexpr int b_bytes = BN * T_TILES * 64;
    template <bool INT8> __host__ __device__ static constexpr int shared_bytes()
    {
        const int stages = STAGES * (a_bytes<INT8>() + b_bytes), out = BN * LD * 4;
        return stages > out ? stages : out;
    }
};
typedef tile_shape<4, 2, 4, 8, 4> tile_large; /* 256 x 128 */
typedef tile_shape<8, 1, 1, 4, 4> tile_small; /* 128 x 32 */

/* As wgmma_product(), and with GROUPS scaled. */
template <class S, bool INT8, bool GROUPS, class F>
__device__ __forceinline__ float *mma_product(const de_cu_linear &w, uint32_t tile0, F row_of,
                                              char *shared)
{
    constexpr int A = S::template a_bytes<INT8>(), B = S::b_bytes, TILE = INT8 ? 512 : 1024;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % S::WM,
                   wn = warp / S::WM;
    const uint32_t tiles = w.in / 32, n_rows = (w.out + 15) / 16,
                   steps = (tiles + T_TILES - 1) / T_TILES;
    const uint32_t groups = w.in / w.group;
    /* this thread's pieces of B: piece threadIdx.x % 8 of rows threadIdx.x / 8 + 32 i */
    const bf16 *rows[S::BN / 32];
#pragma unroll
    for (int i = 0; i < S::BN / 32; i++)
        rows[i] = row_of(threadIdx.x / 8 + 32 * i);
    auto fetch = [&](uint32_t step) {
        if (step < steps) {
            char *a = shared + step % S::STAGES * (A + B), *b = a + A;
#pragma unroll
            for (int i = 0; i < A / (16 * T_THREADS); i++) {
                const uint32_t at = (i * T_THREADS + threadIdx.x) * 16, part = at % TILE,
                               c = at / TILE % T_TILES, r = at / (TILE * T_TILES);
                const uint32_t column = step * T_TILES + c;
                const bool has = tile0 + r < n_rows && column < tiles;
                cu_copy16(a + at,
                          has ? w.w + ((size_t)(tile0 + r) * tiles + column) * TILE + part : w.w,
                          has);
            }
            const uint32_t piece = threadIdx.x % 8, k = step * T_TILES * 32 + piece * 8;
#pragma unroll
            for (int i = 0; i < S::BN / 32; i++) {
                const uint32_t row = threadIdx.x / 8 + 32 * i;
                const bool has = rows[i] && k < w.in;
                cu_copy16(b + row * 128 + (piece ^ row % 8) * 16,
                          has ? rows[i] + k : (const bf16 *)w.w, has);
            }
        }
        cu_copies_commit();
    };
    float acc[S::MT][S::NT][4] = {}, total[GROUPS ? S::MT : 1][GROUPS ? S::NT : 1][4] = {};
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; i++)
        fetch(i);
    for (uint32_t step = 0; step < steps; step++) {
        cu_copies_wait<S::STAGES - 2>();
        __syncthreads();
        fetch(step + S::STAGES - 1);
        const char *a = shared + step % S::STAGES * (A + B), *b = a + A;
#pragma unroll
        for (int c = 0; c < T_TILES; c++) {
            uint32_t fa[S::MT][2][4];
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                const char *at = a + ((wm * S::MT + m) * T_TILES + c) * TILE + lane * 16;
                const uint4 g = *(const uint4 *)at;
                if (INT8) {
                    cu_widen_tile(g, fa[m]);
                } else {
                    cu_bf16_tile(g, *(const uint4 *)(at + (INT8 ? 0 : 512)), fa[m]);
                }
            }
#pragma unroll
            for (int k = 0; k < 2; k++)
#pragma unroll
                for (int n = 0; n < S::NT; n += 2) {
                    uint32_t fb[4];
                    const uint32_t row = (wn * S::NT + n + lane / 16) * 8 + lane % 8,
                                   piece = c * 4 + k * 2 + lane / 8 % 2;
                    cu_ldmatrix(fb, b + row * 128 + (piece ^ row % 8) * 16);
#pragma unroll
                    for (int m = 0; m < S::MT; m++)
                        cu_mma2(&acc[m][n], fa[m][k], fb);
                }
            if (GROUPS) {
                const uint32_t column = step * T_TILES + c;
#pragma unroll
                for (int m = 0; m < S::MT; m++) {
                    const uint32_t r = tile0 + wm * S::MT + m;
                    const float *s =
                        w.scale + (size_t)(r * 16 + lane / 4) * groups + column * 32 / w.group;
                    const bool has = r < n_rows && column < tiles;
                    const float lo = has ? s[0] : 0, hi = has ? s[8 * groups] : 0;
#pragma unroll
                    for (int n = 0; n < S::NT; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            total[m][n][e] = fmaf(acc[m][n][e], e < 2 ? lo : hi, total[m][n][e]);
                            acc[m][n][e] = 0;
                        }
                }
            }
        }
    }
    cu_copies_wait<0>();
    __syncthreads();
    float *out = (float *)shared;
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int n = 0; n < S::NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[(size_t)((wn * S::NT + n) * 8 + lane % 4 * 2 + e % 2) * S::LD +
                    (wm * S::MT + m) * 16 + lane / 4 + e / 2 * 8] =
                    GROUPS ? total[m][n][e] : acc[m][n][e];
    __syncthreads();
    return out;
}

/* Whether the code for this architecture has the kernel: the others are empty. */
template <class S, bool GROUPS> __device__ constexpr bool tile_is_here()
{
    return S::WGMMA ? DE_CU_HAS_WGMMA : GROUPS || !DE_CU_HAS_WGMMA;
}

/* out [BN][LD] float in shared memory = rows of x times W, unscaled if it has one scale a row. row_of(i): where row i of the tile
 * begins, or NULL. `shared` lies at a multiple of 1,024. Ends with a barrier. */
template <class S, bool INT8, bool GROUPS, class F>
__device__ __forceinline__ float *tile_product(const de_cu_linear &w, uint32_t tile0, F row_of,
                                               char *shared)
{
#if DE_CU_HAS_WGMMA
    if constexpr (S::WGMMA)
        return wgmma_product<S, INT8>(w, tile0, row_of, shared);
    else
#endif
        return mma_product<S, INT8, GROUPS>(w, tile0, row_of, shared);
}

/* Four neighbouring outputs of a tile from o on, times their scales if it has any left. */
template <bool SCALED>
__device__ __forceinline__ float4 tile_get(const float *out, const de_cu_linear &w, uint32_t o)
{
    float4 v = *(const float4 *)out;
    if (SCALED) { /* padded to 16 */
        const float *s = w.scale + o;
        v.x *= s[0], v.y *= s[1], v.z *= s[2], v.w *= s[3];
    }
    return v;
}

/* ---- host */

inline bool tile_has_wgmma()
{
    return cu_major() == 9;
}
inline bool tile_has_groups(const de_cu_linear &w)
{
    return w.scale && w.group < w.in;
}

/* rows of x in a tile, by wgmma */
enum tile_size { TILE_16 = 16, TILE_32 = 32, TILE_64 = 64, TILE_96 = 96, TILE_128 = 128 };
typedef wgmma_shape<1, 1, 16, 3> wgmma_16; /* 64 x 16, three blocks an SM */
typedef wgmma_shape<1, 1, 32, 3> wgmma_32;
typedef wgmma_shape<2, 1, 64, 2> wgmma_64; /* 128 x 64 */
/* INT8 leaves room for two blocks an SM, one at its products while the other begins or ends. */
typedef wgmma_shape<2, 1, 96, 2> wgmma_96; /* 128 x 96 */
typedef wgmma_shape<2, 1, 128, 2> wgmma_128;
typedef wgmma_shape<2, 2, 96, 1> wgmma_96_bf16; /* 256 x 96 */
typedef wgmma_shape<2, 2, 128, 1> wgmma_128_bf16;

/* Calls launch(shape, int8, groups) with the types for a matrix; int8 and groups are std::bool_constants. Scale groups keep two sums:
 * only mma.sync's small tile has registers for that. */
template <class F> void choose_tile(const de_cu_linear &w, tile_size size, F launch)
{
    const auto by_type = [&](auto int8, auto bf16) {
        if (w.scale)
            launch(int8, std::true_type(), std::false_type());
        else
            launch(bf16, std::false_type(), std::false_type());
    };
    if (tile_has_groups(w))
        launch(tile_small(), std::true_type(), std::true_type());
    else if (!tile_has_wgmma() && size >= TILE_96)
        by_type(tile_large(), tile_large());
    else if (!tile_has_wgmma())
        by_type(tile_small(), tile_small());
    else if (size == TILE_128)
        by_type(wgmma_128(), wgmma_128_bf16());
    else if (size == TILE_96)
        by_type(wgmma_96(), wgmma_96_bf16());
    else if (size == TILE_64)
        by_type(wgmma_64(), wgmma_64());
    else if (size == TILE_32)
        by_type(wgmma_32(), wgmma_32());
    else
        by_type(wgmma_16(), wgmma_16());
}
/* Rows in a tile of choose_tile(). */
inline uint32_t tile_rows(bool groups, tile_size size)
{
    if (groups || !tile_has_wgmma())
        return !groups && size >= TILE_96 ? tile_large::BN : tile_small::BN;
    return size;
}
/* The largest tile of which there are enough to occupy the multiprocessors. */
inline tile_size tile_for(uint32_t out, uint32_t rows)
{
    const uint32_t enough = cu_multiprocessors() * 2 / 3;
    const auto count = [&](uint32_t bm, uint32_t bn) {
        return ((out + bm - 1) / bm) * ((rows + bn - 1) / bn);
    };
    if (rows > 64 && count(256, 128) >= enough)
        return TILE_128;
    if (rows > 32 && count(128, 64) >= enough)
        return TILE_64;
    return rows > 16 && count(64, 32) >= enough ? TILE_32 : TILE_16;
}

} // namespace

#endif
