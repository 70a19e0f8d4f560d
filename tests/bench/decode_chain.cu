/* decode_chain.cu -- how close to the memory limit can a chain of decode kernels come, and how should it be launched?
 *
 * One token of Qwen3.6-35B-A3B at batch 1, all matrices at their true shapes and formats, random weights made on the device,
 * 40 layers and the head: 4.6 GB are read. Left out: convolution, delta rule, attention over the cache (their states are small at
 * short context), sampling. Norms, residuals, router, top 8 and SwiGLU are there, so that each kernel depends on the last.
 *
 * Each op is compared with a double-precision sum on the host first. Then the chain runs in three ways: launches on a stream, one
 * CUDA graph, one CUDA graph with programmatic dependent launch (each kernel loads its first weights while the one before
 * drains). The limit is the read bandwidth that a plain kernel measures in the same run.
 *
 *   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I engine tests/bench/decode_chain.cu -o decode_chain
 *   ./decode_chain             all of it (46 GB of device memory)
 *   ./decode_chain --check     the comparison alone, for compute-sanitizer
 *
 * What came of it stands in docs/benchmarks/cuda_decode.md. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/common/gemv.cuh"
#include "support/cuda_ok.cuh"

typedef __nv_bfloat16 bf16;
enum {
    HIDDEN = 2048,
    LAYERS = 40,
    EXPERTS = 256,
    TOP = 8,
    WIDTH = 512,
    VOCAB = 248320,
    THREADS = 512,
    WARPS = THREADS / 32
};

/* ---- y = W norm(x) [+ residual]
 *
 * One block of 16 warps on each SM. A warp takes every WALL-th row; D pieces are under way in registers before the wait for x, and
 * each is replaced as soon as it was used. With 64 registers (two blocks on an SM) the compiler spills: far slower. */

enum { SMS = 132, WALL = SMS * WARPS };

struct linear {
    const void *w;     /* [n][k] */
    const bf16 *scale; /* INT8: [n] */
    const bf16 *norm;  /* [k] weight of the norm of x, or NULL */
    const bf16 *x;     /* [k] */
    const bf16 *add;   /* [n] residual, or NULL */
    bf16 *y;           /* [n], or NULL */
    float *yf;         /* [n], or NULL */
    int n, k;
};

/* x of K values in shared memory, with the norm if there is one; rounded to bf16 as the reference does after a norm. */
template <int K> struct vec {
    uint4 x[K / 8];
    float part[WARPS];
};
template <int K>
__device__ __forceinline__ void load_vec(vec<K> &to, const bf16 *from, const bf16 *norm)
{
    constexpr int N = (K / 8 + THREADS - 1) / THREADS; /* 16 bytes of each thread */
    const bool has = N > 1 || threadIdx.x < K / 8;
    uint4 x[N] = {}, g[N] = {};
    float squares = 0;
#pragma unroll
    for (int c = 0; c < N; c++) {
        if (has)
            x[c] = reinterpret_cast<const uint4 *>(from)[c * THREADS + threadIdx.x];
        if (has && norm)
            g[c] = reinterpret_cast<const uint4 *>(norm)[c * THREADS + threadIdx.x];
    }
    if (norm) {
#pragma unroll
        for (int c = 0; c < N; c++) {
            const uint32_t w[4] = { x[c].x, x[c].y, x[c].z, x[c].w };
#pragma unroll
            for (int i = 0; i < 8; i++)
                squares = fmaf(de_bf16::at(w, i), de_bf16::at(w, i), squares);
        }
        squares = gemv_sum(squares);
        if (threadIdx.x % 32 == 0)
            to.part[threadIdx.x / 32] = squares;
        __syncthreads();
        squares = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            squares += to.part[i];
        const float s = rsqrtf(squares / (float)K + 1e-6f);
#pragma unroll
        for (int c = 0; c < N; c++) {
            uint32_t w[4] = { x[c].x, x[c].y, x[c].z, x[c].w },
                     v[4] = { g[c].x, g[c].y, g[c].z, g[c].w };
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const __nv_bfloat162 b = __floats2bfloat162_rn(
                    de_bf16::at(w, 2 * i) * s * de_bf16::at(v, 2 * i),
                    de_bf16::at(w, 2 * i + 1) * s * de_bf16::at(v, 2 * i + 1));
                w[i] = *reinterpret_cast<const uint32_t *>(&b);
            }
            x[c] = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
#pragma unroll
    for (int c = 0; c < N; c++)
        if (has)
            to.x[c * THREADS + threadIdx.x] = x[c];
    __syncthreads();
}
template <class T, int K> struct slice {
    static constexpr int C = K / T::N / 32; /* loads of 512 bytes in a row */
    static __device__ __forceinline__ float dot(const vec<K> &x, const uint4 v[C])
    {
        return gemv_sum(part<C>(x, v, 0));
    }
    /* of n loads from the first-th on, of this lane alone */
    template <int n>
    static __device__ __forceinline__ float part(const vec<K> &x, const uint4 v[n], int first)
    {
        const int lane = threadIdx.x % 32;
        float acc = 0;
#pragma unroll
        for (int c = 0; c < n; c++) {
            float f[T::N];
#pragma unroll
            for (int k = 0; k < T::N / 8; k++) {
                const uint4 u = x.x[((first + c) * 32 + lane) * (T::N / 8) + k];
                const uint32_t w[4] = { u.x, u.y, u.z, u.w };
#pragma unroll
                for (int i = 0; i < 8; i++)
                    f[8 * k + i] = de_bf16::at(w, i);
            }
            acc += gemv_dot<T>(v[c], f);
        }
        return acc;
    }
};

template <class T, int K>
__device__ __forceinline__ void load_row(uint4 v[slice<T, K>::C], const void *w, size_t row)
{
    const char *p = (const char *)w + row * (K * 16 / T::N) + threadIdx.x % 32 * 16;
#pragma unroll
    for (int c = 0; c < slice<T, K>::C; c++)
        v[c] = gemv_load(p + c * 512);
}
/* H pieces to a row. */
template <class T, int K, int D, int H>
__global__ void __launch_bounds__(THREADS, 1) gemv_rows(linear a)
{
    __shared__ vec<K> x;
    constexpr int C = slice<T, K>::C / H, BYTES = K * 16 / T::N;
    const int warp = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int mine = warp < a.n ? ((a.n - 1 - warp) / WALL + 1) * H : 0; /* pieces */
    auto load = [&](uint4 *v, int q) {
        const char *p = (const char *)a.w + (size_t)(warp + q / H * WALL) * BYTES +
                        q % H * (C * 512) + lane * 16;
#pragma unroll
        for (int c = 0; c < C; c++)
            v[c] = gemv_load(p + c * 512);
    };
    uint4 v[D][C];
#pragma unroll
    for (int d = 0; d < D; d++)
        if (d < mine)
            load(v[d], d);
    gemv_release();
    gemv_wait();
    load_vec(x, a.x, a.norm);
    float acc = 0;
    for (int at = 0; at < mine; at += D)
#pragma unroll
        for (int d = 0; d < D; d++) {
            const int q = at + d;
            if (q >= mine)
                break;
            acc += slice<T, K>::template part<C>(x, v[d], q % H * C);
            if (q + D < mine)
                load(v[d], q + D);
            if (q % H != H - 1)
                continue;
            float y = gemv_sum(acc);
            acc = 0;
            const int r = warp + q / H * WALL;
            if (lane)
                continue;
            if (T::N == 16)
                y *= __bfloat162float(a.scale[r]);
            if (a.add)
                y += __bfloat162float(a.add[r]);
            if (a.y)
                a.y[r] = __float2bfloat16(y);
            if (a.yf)
                a.yf[r] = y;
        }
}

/* ---- the router: 256 rows, four warps to each */

__global__ void __launch_bounds__(THREADS, 1) router_rows(linear a)
{
    __shared__ float part[WARPS], squares[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32,
              row = blockIdx.x * (WARPS / 4) + warp / 4, k = warp % 4 * 512 + lane * 8;
    uint4 v[2];
#pragma unroll
    for (int c = 0; c < 2; c++)
        v[c] = gemv_load((const bf16 *)a.w + (size_t)row * HIDDEN + k + c * 256);
    gemv_release();
    gemv_wait();
    float acc = 0, sq = 0;
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float f[8], g[8];
        gemv_x<8>(a.x + k + c * 256, f);
        gemv_x<8>(a.norm + k + c * 256, g);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sq = fmaf(f[i], f[i], sq);
            f[i] *= g[i];
        }
        acc += gemv_dot<de_bf16>(v[c], f);
    }
    acc = gemv_sum(acc);
    sq = gemv_sum(sq);
    if (lane == 0) {
        part[warp] = acc;
        squares[warp] = sq;
    }
    __syncthreads();
    if (threadIdx.x % 128 == 0)
        a.yf[row] = (part[warp] + part[warp + 1] + part[warp + 2] + part[warp + 3]) *
                    rsqrtf((squares[0] + squares[1] + squares[2] + squares[3]) / HIDDEN + 1e-6f);
}

/* The eight largest of 256 logits and the softmax over them, by a warp: lane t has the t-th. Ties: the lower id. */
__device__ __forceinline__ void top8(const float *logits, int &ret_id, float &ret_weight)
{
    const int lane = threadIdx.x % 32;
    uint32_t key[8];
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = logits[i * 32 + lane];
        const uint32_t b = __float_as_uint(v[i]);
        key[i] = b >> 31 ? ~b : b | 0x80000000u; /* orders as the floats do; 0 is none */
    }
    float mine = 0, sum = 0, first = 0;
    int id = 0;
#pragma unroll
    for (int t = 0; t < TOP; t++) {
        uint32_t best = key[0];
#pragma unroll
        for (int i = 1; i < 8; i++)
            best = max(best, key[i]);
        best = __reduce_max_sync(~0u, best);
        uint32_t at = 256; /* the lowest id that has it */
#pragma unroll
        for (int i = 7; i >= 0; i--)
            at = key[i] == best ? (uint32_t)(i * 32 + lane) : at;
        at = __reduce_min_sync(~0u, at);
#pragma unroll
        for (int i = 0; i < 8; i++)
            key[i] = (uint32_t)(i * 32 + lane) == at ? 0 : key[i];
        const float value = __uint_as_float(best >> 31 ? best & 0x7FFFFFFFu : ~best);
        if (t == 0)
            first = value;
        const float p = expf(value - first);
        sum += p;
        if (lane == t) {
            mine = p;
            id = (int)at;
        }
    }
    ret_id = id;
    ret_weight = mine / sum;
}

/* ---- experts: act[e][j] = silu(gate_j x) up_j x. Units of two rows: those of the shared expert (BF16), known before the wait,
 * then those of the chosen ones (INT8) */

struct gate_up {
    const char *w;      /* [EXPERTS][2 * WIDTH][HIDDEN] int8: gates, then ups */
    const bf16 *scale;  /* [EXPERTS][2 * WIDTH] */
    const bf16 *shared; /* [2 * WIDTH][HIDDEN] */
    const bf16 *norm, *x;
    const float *logits;
    int *ids;       /* [TOP] out */
    float *weights; /* [TOP] out */
    bf16 *act;      /* [TOP + 1][WIDTH] */
};

__device__ __forceinline__ void put_act(bf16 *to, float g, float u)
{
    if (threadIdx.x % 32 == 0)
        *to = __float2bfloat16(g / (1.0f + expf(-g)) * u);
}

__global__ void __launch_bounds__(THREADS, 1) experts_gate_up(gate_up a)
{
    __shared__ vec<HIDDEN> x;
    const int warp = blockIdx.x * WARPS + threadIdx.x / 32;
    const bool shares = warp % 4 == 0 && warp / 4 < WIDTH;
    uint4 v[2][4];
    if (shares)
#pragma unroll
        for (int c = 0; c < 4; c++) { /* the first halves of its rows */
            v[0][c] = gemv_load((const char *)(a.shared + (size_t)(warp / 4) * HIDDEN) + c * 512 +
                                threadIdx.x % 32 * 16);
            v[1][c] = gemv_load((const char *)(a.shared + (size_t)(WIDTH + warp / 4) * HIDDEN) +
                                c * 512 + threadIdx.x % 32 * 16);
        }
    gemv_wait();
    gemv_release(); /* behind the wait: what comes next reads logits before its own */
    int mine;
    float weight;
    top8(a.logits, mine, weight);
    load_vec(x, a.x, a.norm);
    if (shares) {
        float g = slice<de_bf16, HIDDEN>::part<4>(x, v[0], 0),
              u = slice<de_bf16, HIDDEN>::part<4>(x, v[1], 0);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            v[0][c] = gemv_load((const char *)(a.shared + (size_t)(warp / 4) * HIDDEN) + 2048 +
                                c * 512 + threadIdx.x % 32 * 16);
            v[1][c] = gemv_load((const char *)(a.shared + (size_t)(WIDTH + warp / 4) * HIDDEN) +
                                2048 + c * 512 + threadIdx.x % 32 * 16);
        }
        g = gemv_sum(g + slice<de_bf16, HIDDEN>::part<4>(x, v[0], 4));
        u = gemv_sum(u + slice<de_bf16, HIDDEN>::part<4>(x, v[1], 4));
        put_act(a.act + TOP * WIDTH + warp / 4, g, u);
    }
    /* of four warps the first has that unit, as long as two, and one more; the others have two or three: 8 units to 4 warps */
    const int quad = warp / 4 * 8,
              from = shares ? quad
                            : quad + (warp % 4) * 2 +
                                  (warp / 4 < WIDTH ? (warp % 4 == 1 ? -1 : 0) : 0);
    const int n = warp / 4 >= WIDTH ? 2 : shares ? 1 : warp % 4 == 1 ? 3 : 2;
    for (int i = 0; i < n && from + i < TOP * WIDTH; i++) {
        const int e = (from + i) / WIDTH, j = (from + i) % WIDTH;
        const size_t row = (size_t)__shfl_sync(~0u, mine, e) * 2 * WIDTH + j;
        load_row<de_int8, HIDDEN>(v[0], a.w, row);
        load_row<de_int8, HIDDEN>(v[1], a.w, row + WIDTH);
        const float g = slice<de_int8, HIDDEN>::dot(x, v[0]) * __bfloat162float(a.scale[row]),
                    u = slice<de_int8, HIDDEN>::dot(x, v[1]) *
                        __bfloat162float(a.scale[row + WIDTH]);
        put_act(a.act + from + i, g, u);
    }
    if (warp == WALL - 1 && threadIdx.x % 32 < TOP) {
        a.ids[threadIdx.x % 32] = mine;
        a.weights[threadIdx.x % 32] = weight;
    }
}

/* ---- h += sum_e weight_e down_e act_e + shared: a warp makes a row, all of its loads under way before the wait */

struct down {
    const char *w;      /* [EXPERTS][HIDDEN][WIDTH] int8 */
    const bf16 *scale;  /* [EXPERTS][HIDDEN] */
    const bf16 *shared; /* [HIDDEN][WIDTH] */
    const bf16 *act;
    const float *logits;
    bf16 *h;
};

__global__ void __launch_bounds__(THREADS, 1) experts_down(down a)
{
    enum { R = 1 };
    const int lane = threadIdx.x % 32, first = blockIdx.x * WARPS + threadIdx.x / 32;
    uint4 v[R][TOP], s[R][2];
    int mine;
    float weight, scale[R];
    top8(a.logits, mine,
         weight); /* the router is done: experts_gate_up waited for it before it released us */
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int row = first + r * WALL;
        if (row >= HIDDEN)
            break;
#pragma unroll
        for (int e = 0; e < TOP; e++)
            v[r][e] = gemv_load(a.w + ((size_t)__shfl_sync(~0u, mine, e) * HIDDEN + row) * WIDTH +
                                lane * 16);
#pragma unroll
        for (int u = 0; u < 2; u++)
            s[r][u] =
                gemv_load((const char *)a.shared + (size_t)row * WIDTH * 2 + u * 512 + lane * 16);
        scale[r] = lane < TOP ? weight * __bfloat162float(a.scale[(size_t)mine * HIDDEN + row]) : 0;
    }
    gemv_release();
    gemv_wait();
    float acc[R] = {};
#pragma unroll
    for (int e = 0; e < TOP; e++) {
        float f[16];
        gemv_x<16>(a.act + e * WIDTH + lane * 16, f);
#pragma unroll
        for (int r = 0; r < R; r++)
            acc[r] += gemv_dot<de_int8>(v[r][e], f) * __shfl_sync(~0u, scale[r], e);
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
        float f[8];
        gemv_x<8>(a.act + TOP * WIDTH + u * 256 + lane * 8, f);
#pragma unroll
        for (int r = 0; r < R; r++)
            acc[r] += gemv_dot<de_bf16>(s[r][u], f);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int row = first + r * WALL;
        const float y = gemv_sum(acc[r]);
        if (lane == 0 && row < HIDDEN)
            a.h[row] = __float2bfloat16(__bfloat162float(a.h[row]) + y);
    }
}

/* ---- random weights, and the limit */

__device__ __host__ inline uint32_t mix(uint64_t i, uint32_t salt)
{
    uint64_t z = (i + salt * 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return (uint32_t)(z >> 32);
}
__global__ void fill_int8(uint32_t *p, size_t n, uint32_t salt)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = mix(i, salt);
}
__global__ void fill_bf16(bf16 *p, size_t n, uint32_t salt, float size, float middle)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = __float2bfloat16(middle + ((float)mix(i, salt) * 0x1p-31f - 1.0f) * size);
}
__global__ void __launch_bounds__(512) read_all(const uint4 *p, size_t n, uint32_t *out)
{
    uint32_t x = 0;
    const size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i + 3 * step < n;
         i += 4 * step) {
        const uint4 a = gemv_load(p + i), b = gemv_load(p + i + step),
                    c = gemv_load(p + i + 2 * step), d = gemv_load(p + i + 3 * step);
        x ^= a.x ^ b.y ^ c.z ^ d.w ^ a.w ^ b.z ^ c.y ^ d.x;
    }
    if (x == 0x12345678u)
        *out = x;
}

template <class T> static T *get(size_t n)
{
    void *p;
    OK(cudaMalloc(&p, n * sizeof(T)));
    return (T *)p;
}
static uint32_t salt;
static char *int8s(size_t n)
{
    char *p = get<char>(n);
    fill_int8<<<2048, 256>>>((uint32_t *)p, n / 4, ++salt);
    return p;
}
static bf16 *bf16s(size_t n, float size, float middle = 0)
{
    bf16 *p = get<bf16>(n);
    fill_bf16<<<2048, 256>>>(p, n, ++salt, size, middle);
    return p;
}

/* ---- launching */

static cudaStream_t stream;
static bool dependent;
template <class A> static void launch(void (*f)(A), dim3 grid, int threads, A a)
{
    cudaLaunchAttribute attr[1] = {};
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t c = {};
    c.gridDim = grid;
    c.blockDim = dim3(threads);
    c.stream = stream;
    c.attrs = attr;
    c.numAttrs = dependent ? 1 : 0;
    OK(cudaLaunchKernelEx(&c, f, a));
}
template <class T, int K, int D, int H> static void run(const linear &a)
{
    launch(gemv_rows<T, K, D, H>, dim3(SMS), THREADS, a);
}
static void run_gdn_in(const linear &a)
{
    run<de_bf16, 2048, 1, 1>(a);
}
static void run_gdn_out(const linear &a)
{
    run<de_bf16, 4096, 1, 2>(a);
}
static void run_attn_in(const linear &a)
{
    run<de_int8, 2048, 2, 1>(a);
}
static void run_attn_out(const linear &a)
{
    run<de_int8, 4096, 1, 1>(a);
}
static void run_head(const linear &a)
{
    run<de_bf16, 2048, 1, 1>(a);
}
static void run_router(const linear &a)
{
    launch(router_rows, dim3(EXPERTS / (WARPS / 4)), THREADS, a);
}

struct layer {
    bool gdn;
    linear in, out, router;
    gate_up gu;
    down dn;
};
static bf16 *h, *mid, *act;
static float *router_logits, *head_logits, *top_weights;
static int *top_ids;
static linear head;
static std::vector<layer> layers;
static double token_bytes;

static void token()
{
    for (layer &l : layers) {
        (l.gdn ? run_gdn_in : run_attn_in)(l.in);
        (l.gdn ? run_gdn_out : run_attn_out)(l.out);
        run_router(l.router);
        launch(experts_gate_up, dim3(SMS), THREADS, l.gu);
        launch(experts_down, dim3(SMS), THREADS, l.dn);
    }
    run_head(head);
}

static void build()
{
    h = bf16s(HIDDEN, 1);
    mid = bf16s(16384, 1);
    act = bf16s((TOP + 1) * WIDTH, 1);
    router_logits = get<float>(EXPERTS);
    head_logits = get<float>(VOCAB);
    top_weights = get<float>(TOP);
    top_ids = get<int>(TOP);
    OK(cudaMemset(top_ids, 0, TOP * sizeof(int)));
    for (int i = 0; i < LAYERS; i++) {
        layer l = {};
        l.gdn = i % 4 != 3;
        const bf16 *norm = bf16s(HIDDEN, 0.1f, 1), *norm2 = bf16s(HIDDEN, 0.1f, 1);
        const int n = l.gdn ? 8192 + 4096 + 64 : 8192 + 1024;
        l.in = { l.gdn ? (void *)bf16s((size_t)n * HIDDEN, 0.04f) : int8s((size_t)n * HIDDEN),
                 bf16s(n, 0.0003f),
                 norm,
                 h,
                 NULL,
                 mid,
                 NULL,
                 n,
                 HIDDEN };
        l.out = { l.gdn ? (void *)bf16s((size_t)HIDDEN * 4096, 0.01f)
                        : int8s((size_t)HIDDEN * 4096),
                  bf16s(HIDDEN, 0.0001f),
                  NULL,
                  mid,
                  h,
                  h,
                  NULL,
                  HIDDEN,
                  4096 };
        l.router = { bf16s((size_t)EXPERTS * HIDDEN, 0.04f),
                     NULL,
                     norm2,
                     h,
                     NULL,
                     NULL,
                     router_logits,
                     EXPERTS,
                     HIDDEN };
        l.gu = { int8s((size_t)EXPERTS * 2 * WIDTH * HIDDEN),
                 bf16s(EXPERTS * 2 * WIDTH, 0.0003f),
                 bf16s((size_t)2 * WIDTH * HIDDEN, 0.04f),
                 norm2,
                 h,
                 router_logits,
                 top_ids,
                 top_weights,
                 act };
        l.dn = { int8s((size_t)EXPERTS * HIDDEN * WIDTH),
                 bf16s(EXPERTS * HIDDEN, 0.0003f),
                 bf16s((size_t)HIDDEN * WIDTH, 0.04f),
                 act,
                 router_logits,
                 h };
        layers.push_back(l);
        const double w = l.gdn ? 2 : 1;
        token_bytes += w * ((double)n * HIDDEN + (double)HIDDEN * 4096) + 2.0 * EXPERTS * HIDDEN +
                       (TOP + 2.0) * 3 * WIDTH * HIDDEN;
    }
    head = { bf16s((size_t)VOCAB * HIDDEN, 0.04f),
             NULL,
             bf16s(HIDDEN, 0.1f, 1),
             h,
             NULL,
             NULL,
             head_logits,
             VOCAB,
             HIDDEN };
    token_bytes += 2.0 * VOCAB * HIDDEN;
    OK(cudaDeviceSynchronize());
}

/* ---- right? every op against double sums on the host, some rows of each */

static double value(bf16 b)
{
    return (double)__bfloat162float(b);
}
template <class T> static std::vector<T> fetch(const T *p, size_t n)
{
    std::vector<T> v(n);
    OK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}
static std::vector<double> normed(const bf16 *x, const bf16 *norm, int k, bool rounded = true)
{
    auto a = fetch(x, k);
    std::vector<double> y(k);
    double s = 0;
    for (int i = 0; i < k; i++)
        s += value(a[i]) * value(a[i]);
    auto g = norm ? fetch(norm, k) : std::vector<bf16>();
    for (int i = 0; i < k; i++)
        y[i] =
            !norm ? value(a[i])
            : rounded
                ? value(__float2bfloat16((float)(value(a[i]) / sqrt(s / k + 1e-6) * value(g[i]))))
                : value(a[i]) / sqrt(s / k + 1e-6) * value(g[i]);
    return y;
}
static double row_dot(const void *w, bool int8, size_t row, int k, const std::vector<double> &x)
{
    double s = 0;
    if (int8) {
        auto v = fetch((const int8_t *)w + row * k, k);
        for (int i = 0; i < k; i++)
            s += v[i] * x[i];
    } else {
        auto v = fetch((const bf16 *)w + row * k, k);
        for (int i = 0; i < k; i++)
            s += value(v[i]) * x[i];
    }
    return s;
}
static double worst;
static void compare(double got, double want, double size)
{
    worst = std::max(worst, fabs(got - want) / size);
}
static void check_linear(const char *name, linear a, bool int8, void (*f)(const linear &))
{
    auto x = normed(a.x, a.norm, a.k);
    auto add = a.add ? fetch(a.add, a.n) : std::vector<bf16>();
    float *yf = get<float>(a.n);
    a.yf = yf;
    a.y = NULL;
    f(a);
    OK(cudaStreamSynchronize(stream));
    auto y = fetch(yf, a.n);
    worst = 0;
    double norm = 0;
    for (double v : x)
        norm += v * v;
    for (int i = 0; i < 64; i++) {
        const size_t row = i < 2 ? (size_t)i : i == 2 ? a.n - 1 : mix(i, 77) % a.n;
        double want = row_dot(a.w, int8, row, a.k, x);
        if (int8)
            want *= value(fetch(a.scale + row, 1)[0]);
        if (a.add)
            want += value(add[row]);
        compare(y[row], want, int8 ? 100 * sqrt(norm) * 0.0003 : sqrt(norm) * 0.04);
    }
    printf("check %-24s %.1e\n", name, worst);
    if (!(worst < 1e-3)) /* now and then a normed activation is rounded the other way */
        exit(1);
}
static void check_experts(const layer &l)
{
    auto before = fetch(h, HIDDEN);
    run_router(l.router);
    launch(experts_gate_up, dim3(SMS), THREADS, l.gu);
    OK(cudaStreamSynchronize(stream));
    auto raw = normed(h, l.router.norm, HIDDEN, false);
    auto logits = fetch(router_logits, EXPERTS);
    auto ids = fetch(top_ids, TOP);
    auto p = fetch(top_weights, TOP);
    worst = 0;
    for (int i = 0; i < EXPERTS; i++)
        compare(logits[i], row_dot(l.router.w, false, i, HIDDEN, raw), 0.04 * sqrt((double)HIDDEN));
    printf("check %-24s %.1e\n", "router", worst);
    if (!(worst < 1e-5))
        exit(1);
    std::vector<int> order(EXPERTS);
    for (int i = 0; i < EXPERTS; i++)
        order[i] = i;
    std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    double sum = 0;
    for (int i = 0; i < TOP; i++)
        sum += exp((double)logits[order[i]] - logits[order[0]]);
    for (int i = 0; i < TOP; i++)
        if (ids[i] != order[i] ||
            fabs(p[i] - exp((double)logits[order[i]] - logits[order[0]]) / sum) > 1e-6) {
            printf("top8 is wrong at %d\n", i);
            exit(1);
        }
    auto x = normed(h, l.gu.norm, HIDDEN);
    launch(experts_down, dim3(SMS), THREADS, l.dn);
    OK(cudaStreamSynchronize(stream));
    auto got = fetch(act, (TOP + 1) * WIDTH);
    worst = 0;
    for (int e = 0; e <= TOP; e++)
        for (int i = 0; i < 12; i++) {
            const int j = i == 0 ? 0 : i == 1 ? WIDTH - 1 : (int)(mix(i, e) % WIDTH);
            const bool int8 = e < TOP;
            const size_t base = int8 ? (size_t)ids[e] * 2 * WIDTH : 0;
            const void *w = int8 ? (const void *)l.gu.w : (const void *)l.gu.shared;
            double g = row_dot(w, int8, base + j, HIDDEN, x),
                   u = row_dot(w, int8, base + WIDTH + j, HIDDEN, x);
            if (int8) {
                g *= value(fetch(l.gu.scale + base + j, 1)[0]);
                u *= value(fetch(l.gu.scale + base + WIDTH + j, 1)[0]);
            }
            const double want = g / (1 + exp(-g)) * u;
            compare(value(got[e * WIDTH + j]), want, fabs(want) + 0.05); /* rounded to bf16: 2^-9 */
        }
    printf("check %-24s %.1e (rounded to bf16)\n", "experts_gate_up", worst);
    if (!(worst < 4.2e-3))
        exit(1);
    auto after = fetch(h, HIDDEN);
    worst = 0;
    for (int i = 0; i < 24; i++) {
        const size_t row = i == 0 ? 0 : i == 1 ? HIDDEN - 1 : mix(i, 5) % HIDDEN;
        double want = value(before[row]);
        for (int e = 0; e <= TOP; e++) {
            std::vector<double> a(WIDTH);
            for (int k = 0; k < WIDTH; k++)
                a[k] = value(got[e * WIDTH + k]);
            if (e < TOP)
                want += (double)p[e] *
                        value(fetch(l.dn.scale + (size_t)ids[e] * HIDDEN + row, 1)[0]) *
                        row_dot(l.dn.w, true, (size_t)ids[e] * HIDDEN + row, WIDTH, a);
            else
                want += row_dot(l.dn.shared, false, row, WIDTH, a);
        }
        compare(value(after[row]), want, fabs(want) + 0.05);
    }
    printf("check %-24s %.1e (rounded to bf16)\n", "experts_down", worst);
    if (!(worst < 4.2e-3))
        exit(1);
}

/* ---- fast? */

template <class F> static double seconds(F f, int n)
{
    cudaEvent_t a, b;
    float ms;
    OK(cudaEventCreate(&a));
    OK(cudaEventCreate(&b));
    for (int i = 0; i < 3; i++)
        f();
    OK(cudaEventRecord(a, stream));
    for (int i = 0; i < n; i++)
        f();
    OK(cudaEventRecord(b, stream));
    OK(cudaEventSynchronize(b));
    OK(cudaEventElapsedTime(&ms, a, b));
    return ms * 1e-3 / n;
}

static cudaGraphExec_t capture(bool with_dependent)
{
    cudaGraph_t g;
    cudaGraphExec_t e;
    dependent = with_dependent;
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    token();
    OK(cudaStreamEndCapture(stream, &g));
    OK(cudaGraphInstantiate(&e, g, 0));
    dependent = false;
    return e;
}

template <class F> static void time_op(const char *name, double bytes, double limit, F f)
{
    const double t = seconds(f, 20) / LAYERS;
    printf("%-28s %8.2f MB %8.2f us %7.0f GB/s %5.1f %%\n", name, bytes * 1e-6, t * 1e6,
           bytes / t * 1e-9, 100 * bytes / t / limit);
}

int main(int argc, char **argv)
{
    cudaDeviceProp d;
    OK(cudaGetDeviceProperties(&d, 0));
    OK(cudaStreamCreate(&stream));
    printf("%s, %d SMs\n", d.name, d.multiProcessorCount);
    build();
    check_linear("bf16 2048 -> 12352", layers[0].in, false, run_gdn_in);
    check_linear("bf16 4096 -> 2048, added", layers[0].out, false, run_gdn_out);
    check_linear("int8 2048 -> 9216", layers[3].in, true, run_attn_in);
    check_linear("int8 4096 -> 2048, added", layers[3].out, true, run_attn_out);
    check_linear("bf16 2048 -> 248320", head, false, run_head);
    check_experts(layers[0]);
    if (argc > 1 && strcmp(argv[1], "--check") == 0)
        return 0;

    uint32_t *out = get<uint32_t>(1);
    const size_t n = (size_t)4 << 30;
    char *big = get<char>(n), *copy = get<char>(n);
    OK(cudaMemset(big, 1, n));
    double limit = 0;
    for (int blocks : { 264, 528, 1056, 2112 })
        limit = std::max(limit, (double)n / seconds(
                                                [&] {
                                                    read_all<<<blocks, 512, 0, stream>>>(
                                                        (const uint4 *)big, n / 16, out);
                                                },
                                                5));
    const double copied =
        2.0 * n /
        seconds([&] { OK(cudaMemcpyAsync(copy, big, n, cudaMemcpyDeviceToDevice, stream)); }, 5);
    printf("read %.0f GB/s, copy %.0f GB/s\n", limit * 1e-9, copied * 1e-9);

    /* 40 of a kind in a row, over different layers. */
    for (int d = 0; d < 2; d++) {
        dependent = d;
        printf("\n%-28s %11s %11s %12s %7s\n", d ? "op, dependent launch" : "op", "bytes", "time",
               "rate", "limit");
        time_op("GDN in, bf16 12352 x 2048", 2.0 * 12352 * HIDDEN, limit, [] {
            for (int i = 0; i < LAYERS; i++)
                run_gdn_in(layers[i % 4 == 3 ? i - 1 : i].in);
        });
        time_op("GDN out, bf16 2048 x 4096", 2.0 * 4096 * HIDDEN, limit, [] {
            for (int i = 0; i < LAYERS; i++)
                run_gdn_out(layers[i % 4 == 3 ? i - 1 : i].out);
        });
        time_op("attention in, int8 9216 x 2048", 9216.0 * HIDDEN, limit, [] {
            for (int i = 0; i < LAYERS; i++)
                run_attn_in(layers[i / 4 * 4 + 3].in);
        });
        time_op("router, bf16 256 x 2048", 2.0 * EXPERTS * HIDDEN, limit, [] {
            for (int i = 0; i < LAYERS; i++)
                run_router(layers[i].router);
        });
        time_op("experts gate, up", (TOP + 2.0) * 2 * WIDTH * HIDDEN, limit, [] {
            for (int i = 0; i < LAYERS; i++)
                launch(experts_gate_up, dim3(SMS), THREADS, layers[i].gu);
        });
        time_op("experts down", (TOP + 2.0) * WIDTH * HIDDEN, limit, [] {
            for (int i = 0; i < LAYERS; i++)
                launch(experts_down, dim3(SMS), THREADS, layers[i].dn);
        });
    }
    dependent = false;
    {
        const double t = seconds([] { run_head(head); }, 20), bytes = 2.0 * VOCAB * HIDDEN;
        printf("%-28s %8.2f MB %8.2f us %7.0f GB/s %5.1f %%\n", "head, bf16 248320 x 2048",
               bytes * 1e-6, t * 1e6, bytes / t * 1e-9, 100 * bytes / t / limit);
    }

    printf("\n%.3f GB a token; limit %.0f tok/s\n", token_bytes * 1e-9, limit / token_bytes);
    cudaGraphExec_t plain = capture(false), pdl = capture(true);
    struct {
        const char *name;
        double t;
    } modes[] = {
        { "stream", seconds([] { token(); }, 30) },
        { "graph", seconds([&] { OK(cudaGraphLaunch(plain, stream)); }, 100) },
        { "graph, dependent launch", seconds([&] { OK(cudaGraphLaunch(pdl, stream)); }, 100) },
    };
    for (auto &m : modes)
        printf("chain, %-24s %8.1f us a token %7.1f tok/s %5.1f %% of the limit\n", m.name,
               m.t * 1e6, 1 / m.t, 100 * token_bytes / m.t / limit);
    auto y = fetch(head_logits, 16);
    printf("finite: %s\n", std::isfinite(y[0]) && std::isfinite(y[15]) ? "yes" : "NO");
    return 0;
}
