/* test_cuda_attn.cu -- attention over pages, prefill and decode, against double on the host, from the same BF16 inputs.
 *
 *   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I engine tests/ops/test_cuda_attn.cu \
 *        engine/kernels/cuda/{attn_decode,attn_prefill,rows}.cu -o test_cuda_attn
 *   ./test_cuda_attn [--small] [SEED]      --small: few small shapes, for compute-sanitizer
 *   ./test_cuda_attn --bench               times, shape of 35B, fp8 pages of random values
 *
 * Each sequence is computed in two prefills and then a step of decode, its pages dealt out at random. Errors are norms of
 * differences over norms, of the worst sequence. A sequence alone and among others must have equal bits, and both prefills in one
 * forward as well. Exit 1 if a bound is not kept. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <cuda_fp8.h>

#include "kernels/cuda/ops.cuh"
#include "support/cuda_ok.cuh"

enum { D = DE_CU_ATTN, ROTARY = 64 };

static int failures;
static uint64_t state = 1;

static double uniform() /* [0, 1) */
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-53;
}
static float normal()
{
    return (float)(uniform() + uniform() + uniform() + uniform() - 2) * 1.7320508f;
}
static void report(const char *what, double error, double bound)
{
    const bool good = error <= bound;
    printf("%-56s %.2e, at most %.0e %s\n", what, error, bound, good ? "pass" : "FAIL");
    failures += !good;
}

template <class T> struct buffer { /* the same on host and device */
    std::vector<T> v;
    T *d = NULL;
    explicit buffer(size_t n) : v(n)
    {
        OK(cudaMalloc(&d, n * sizeof(T) + 16));
        OK(cudaMemset(d, 0, n * sizeof(T)));
    }
    buffer(const buffer &) = delete;
    ~buffer()
    {
        (void)cudaFree(d);
    }
    void up()
    {
        OK(cudaMemcpy(d, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    void down()
    {
        OK(cudaDeviceSynchronize());
        OK(cudaMemcpy(v.data(), d, v.size() * sizeof(T), cudaMemcpyDeviceToHost));
    }
};

/* What is in one batch: rows [from, to) of each sequence, and where they are. */
struct sequence {
    uint32_t first, second;     /* rows of the first prefill, of the second; then one of decode */
    std::vector<float> x, rope; /* projections and angles of all rows */
    std::vector<uint32_t> pages;
    uint32_t all() const
    {
        return first + second + 1;
    }
    /* Stages: the first prefill, the second, decode; or both prefills in one. */
    uint32_t start(int stage) const
    {
        return stage == 1 ? first : stage == 2 ? first + second : 0;
    }
    uint32_t rows(int stage) const
    {
        return stage == 0 ? first : stage == 1 ? second : stage == 2 ? 1 : first + second;
    }
};

struct setting {
    uint32_t q_heads, kv_heads;
    bool fp8;
    size_t width() const
    {
        return ((size_t)q_heads * 2 + kv_heads * 2) * D;
    }
};

static float kept(float v, bool fp8) /* as it stands in a page */
{
    if (!fp8)
        return __bfloat162float(__float2bfloat16(v));
    const __half_raw h =
        __nv_cvt_fp8_to_halfraw(__nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3), __NV_E4M3);
    return __half2float(__half(h));
}

static void head(const float *x, const float *w, const float *rope, double *to)
{
    double s = 0;
    for (int d = 0; d < D; d++)
        s += (double)x[d] * x[d];
    s = 1 / sqrt(s / D + 1e-6);
    for (int d = 0; d < D; d++)
        to[d] = x[d] * s * (1 + (double)w[d]);
    for (int i = 0; i < ROTARY / 2; i++) {
        const double a = to[i], b = to[i + ROTARY / 2], c = rope[i], n = rope[ROTARY / 2 + i];
        to[i] = a * c - b * n;
        to[i + ROTARY / 2] = b * c + a * n;
    }
}

/* Row `row` of the sequence: [q_heads][256]. k and v: of all rows, kept. */
static void want(const setting &s, const sequence &q, const float *q_norm, uint32_t row,
                 const std::vector<float> &k, const std::vector<float> &v, std::vector<double> &y)
{
    std::vector<double> query(D), p(row + 1);
    const float *x = &q.x[row * s.width()];
    y.assign((size_t)s.q_heads * D, 0);
    for (uint32_t h = 0; h < s.q_heads; h++) {
        const uint32_t kv = h / (s.q_heads / s.kv_heads);
        double max = -INFINITY, sum = 0;
        head(x + (size_t)h * 2 * D, q_norm, &q.rope[row * ROTARY], query.data());
        for (uint32_t t = 0; t <= row; t++) {
            p[t] = 0;
            for (int d = 0; d < D; d++)
                p[t] += query[d] * k[((size_t)t * s.kv_heads + kv) * D + d];
            p[t] /= 16;
            max = fmax(max, p[t]);
        }
        for (uint32_t t = 0; t <= row; t++)
            sum += p[t] = exp(p[t] - max);
        for (uint32_t t = 0; t <= row; t++)
            for (int d = 0; d < D; d++)
                y[h * D + d] += p[t] / sum * v[((size_t)t * s.kv_heads + kv) * D + d];
        for (int d = 0; d < D; d++)
            y[h * D + d] /= 1 + exp(-(double)x[((size_t)h * 2 + 1) * D + d]);
    }
}

static uint8_t *workspace(size_t bytes) /* poisoned; the last one is taken back */
{
    static uint8_t *p;
    static size_t had;
    if (bytes > had) {
        OK(cudaFree(p));
        OK(cudaMalloc(&p, bytes));
        had = bytes;
    }
    OK(cudaMemset(p, 0xFF, bytes));
    return p;
}

/* One batch of rows [from, to) of the sequences `which` -> y of each, row by row. */
static void run(const setting &s, de_cu_attn a, const std::vector<sequence> &all,
                const std::vector<uint32_t> &which, int stage, std::vector<std::vector<bf16>> &y)
{
    uint32_t rows = 0, max_rows = 0, ctx_max = 0, n_pages = 0;
    for (uint32_t i : which) {
        rows += all[i].rows(stage);
        n_pages += (uint32_t)all[i].pages.size();
    }
    if (rows == 0)
        return;
    buffer<bf16> p(rows * s.width()), out((size_t)rows * s.q_heads * D);
    buffer<float> rope((size_t)rows * ROTARY);
    buffer<uint32_t> pages(n_pages);
    std::vector<de_cu_seq> seqs;
    uint32_t row = 0, page = 0;
    for (uint32_t i : which) {
        const sequence &q = all[i];
        const uint32_t start = q.start(stage), n = q.rows(stage);
        memcpy(&pages.v[page], q.pages.data(), q.pages.size() * 4);
        if (n) {
            seqs.push_back({ row, n, start, i, page });
            for (size_t k = 0; k < n * s.width(); k++)
                p.v[row * s.width() + k] = __float2bfloat16(q.x[start * s.width() + k]);
            memcpy(&rope.v[(size_t)row * ROTARY], &q.rope[(size_t)start * ROTARY],
                   (size_t)n * ROTARY * 4);
            max_rows = n > max_rows ? n : max_rows;
            ctx_max = start + n > ctx_max ? start + n : ctx_max;
        }
        row += n;
        page += (uint32_t)q.pages.size();
    }
    const uint32_t n_seqs = (uint32_t)seqs.size();
    buffer<de_cu_seq> s_d(n_seqs);
    uint8_t *const work = workspace(stage == 2 ? de_cu_attn_decode_bytes(a, n_seqs)
                                               : de_cu_attn_prefill_bytes(a, rows));
    s_d.v = seqs;
    p.up(), rope.up(), pages.up(), s_d.up();
    if (stage != 2)
        de_cu_attn_prefill(NULL, a, p.d, s.width(), rope.d, s_d.d, pages.d, n_seqs, rows, max_rows,
                           ctx_max, out.d, work);
    else
        de_cu_attn_decode(NULL, a, p.d, s.width(), rope.d, s_d.d, pages.d, n_seqs, 40000, out.d,
                          work, true);
    OK(cudaGetLastError());
    out.down();
    for (uint32_t i = 0; i < n_seqs; i++)
        y[seqs[i].slot].insert(y[seqs[i].slot].end(), &out.v[(size_t)seqs[i].row * s.q_heads * D],
                               &out.v[(size_t)(seqs[i].row + seqs[i].n_rows - 1) * s.q_heads * D] +
                                   (size_t)s.q_heads * D);
}

static void test(const setting &s, const std::vector<std::pair<uint32_t, uint32_t>> &lengths)
{
    std::vector<sequence> all;
    std::vector<uint32_t> free_pages, everybody;
    buffer<float> q_norm(D), k_norm(D);
    for (int d = 0; d < D; d++) {
        q_norm.v[d] = 0.2f * normal();
        k_norm.v[d] = 0.2f * normal();
    }
    q_norm.up(), k_norm.up();
    uint32_t n_pages = 3;
    for (auto l : lengths)
        n_pages += (l.first + l.second + 1 + 63) / 64;
    for (uint32_t i = 0; i < n_pages; i++)
        free_pages.insert(free_pages.begin() + (size_t)(uniform() * (i + 1)), i);
    for (auto l : lengths) {
        sequence q;
        q.first = l.first;
        q.second = l.second;
        q.x.resize(q.all() * s.width());
        q.rope.resize((size_t)q.all() * ROTARY);
        for (float &v : q.x)
            v = __bfloat162float(__float2bfloat16(normal()));
        for (uint32_t t = 0; t < q.all(); t++)
            for (int i = 0; i < ROTARY / 2; i++) {
                const double angle = t * pow(1e7, -2.0 * i / ROTARY);
                q.rope[(size_t)t * ROTARY + i] = (float)cos(angle);
                q.rope[(size_t)t * ROTARY + ROTARY / 2 + i] = (float)sin(angle);
            }
        for (uint32_t k = 0; k < (q.all() + 63) / 64; k++) {
            q.pages.push_back(free_pages.back());
            free_pages.pop_back();
        }
        everybody.push_back((uint32_t)all.size());
        all.push_back(q);
    }
    de_cu_attn a = {};
    a.q_heads = s.q_heads, a.kv_heads = s.kv_heads, a.rotary = ROTARY;
    a.q_norm = q_norm.d, a.k_norm = k_norm.d, a.eps = 1e-6f;
    a.kv_type = s.fp8 ? DE_CU_KV_FP8 : DE_CU_KV_BF16;
    a.page_bytes = (size_t)s.kv_heads * 2 * 64 * D * (s.fp8 ? 1 : 2);
    buffer<uint8_t> kv(n_pages * a.page_bytes), again(n_pages * a.page_bytes);
    a.kv = kv.d;
    std::vector<std::vector<bf16>> y(all.size()), alone(all.size()), whole(all.size());
    for (int stage = 0; stage < 3; stage++)
        run(s, a, all, everybody, stage, y);
    a.kv = again.d;
    const uint32_t pick = (uint32_t)all.size() / 2;
    for (int stage = 0; stage < 3; stage++)
        run(s, a, all, { pick }, stage, alone);
    OK(cudaMemset(again.d, 0, again.v.size()));
    run(s, a, all, everybody, 3, whole);
    bool same = true;
    for (size_t i = 0; i < all.size(); i++)
        same &= whole[i].size() <= y[i].size() &&
                memcmp(whole[i].data(), y[i].data(), whole[i].size() * sizeof(bf16)) == 0;
    double worst[2] = { 0, 0 };
    for (size_t i = 0; i < all.size(); i++) {
        const sequence &q = all[i];
        std::vector<float> k((size_t)q.all() * s.kv_heads * D), v(k.size());
        std::vector<double> row(D), w;
        for (uint32_t t = 0; t < q.all(); t++)
            for (uint32_t h = 0; h < s.kv_heads; h++) {
                const float *x = &q.x[t * s.width() + (size_t)s.q_heads * 2 * D + h * D];
                head(x, k_norm.v.data(), &q.rope[(size_t)t * ROTARY], row.data());
                for (int d = 0; d < D; d++) {
                    k[((size_t)t * s.kv_heads + h) * D + d] = kept((float)row[d], s.fp8);
                    v[((size_t)t * s.kv_heads + h) * D + d] =
                        kept(x[(size_t)s.kv_heads * D + d], s.fp8);
                }
            }
        double error[2] = { 0, 0 }, square[2] = { 0, 0 };
        const uint32_t last = q.all() - 1;
        for (uint32_t t = 0; t <= last;
             t += t + 1 < last && q.all() > 200 ? (t + 37 < last ? 37 : last - t - 1) : 1) {
            want(s, q, q_norm.v.data(), t, k, v, w);
            for (size_t c = 0; c < w.size(); c++) {
                const double g = __bfloat162float(y[i][t * w.size() + c]) - w[c];
                error[t == last] += g * g;
                square[t == last] += w[c] * w[c];
            }
        }
        for (int f = 0; f < 2; f++)
            if (square[f] > 0 && !(sqrt(error[f] / square[f]) <= worst[f]))
                worst[f] = sqrt(error[f] / square[f]);
    }
    printf("%u query and %u key heads, %s, %zu sequences\n", s.q_heads, s.kv_heads,
           s.fp8 ? "fp8" : "bf16", all.size());
    report("  prefill", worst[0], 8e-3); /* queries, probabilities and y are rounded to bf16 */
    report("  decode", worst[1], 8e-3);
    report("  bits alone and among others",
           y[pick].size() != alone[pick].size() ||
               memcmp(y[pick].data(), alone[pick].data(), y[pick].size() * sizeof(bf16)) != 0,
           0);
    report("  bits of two prefills and of one", !same, 0);
}

/* ---- times */

__global__ void fill_kernel(uint32_t *to, size_t n, uint32_t mask, uint32_t set)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u + (uint32_t)(i >> 32) + 12345u;
        x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
        to[i] = (x & mask) | set;
    }
}
struct times {
    float median, low, high;
};
/* Of `repeats` runs of `calls` calls in a graph, microseconds a call. */
template <class F> static times timed(int repeats, int calls, F call)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t a, b;
    std::vector<float> us;
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    OK(cudaEventCreate(&a));
    OK(cudaEventCreate(&b));
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; i++)
        call(stream, i);
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < repeats + 2; i++) {
        float ms;
        OK(cudaEventRecord(a, stream));
        OK(cudaGraphLaunch(exec, stream));
        OK(cudaEventRecord(b, stream));
        OK(cudaEventSynchronize(b));
        OK(cudaEventElapsedTime(&ms, a, b));
        if (i >= 2)
            us.push_back(ms * 1000 / (float)calls);
    }
    OK(cudaGetLastError());
    OK(cudaGraphExecDestroy(exec));
    OK(cudaGraphDestroy(graph));
    OK(cudaStreamDestroy(stream));
    std::sort(us.begin(), us.end());
    return { us[us.size() / 2], us.front(), us.back() };
}
static void bench()
{
    enum { PAGES = 16384, WIDTH = (16 * 2 + 2 * 2) * D, MOST = 8192 };
    de_cu_attn a = {};
    a.q_heads = 16, a.kv_heads = 2, a.rotary = ROTARY, a.eps = 1e-6f, a.kv_type = DE_CU_KV_FP8;
    a.page_bytes = 2 * 2 * 64 * D;
    uint8_t *kv, *work;
    bf16 *p, *y;
    float *rope, *norm;
    OK(cudaMalloc(&kv, PAGES * a.page_bytes));
    OK(cudaMalloc(&p, (size_t)MOST * WIDTH * 2));
    OK(cudaMalloc(&y, (size_t)MOST * 16 * D * 2));
    OK(cudaMalloc(&rope, (size_t)MOST * ROTARY * 4));
    OK(cudaMalloc(&norm, D * 4));
    OK(cudaMemset(norm, 0, D * 4));
    OK(cudaMalloc(&work,
                  std::max(de_cu_attn_prefill_bytes(a, MOST), de_cu_attn_decode_bytes(a, 64))));
    a.kv = kv, a.q_norm = a.k_norm = norm;
    fill_kernel<<<1024, 256>>>((uint32_t *)kv, PAGES * a.page_bytes / 4, 0xBFBFBFBFu, 0);
    fill_kernel<<<1024, 256>>>((uint32_t *)p, (size_t)MOST * WIDTH / 2, 0x80FF80FFu, 0x3F003F00u);
    fill_kernel<<<1024, 256>>>((uint32_t *)rope, (size_t)MOST * ROTARY, 0x807FFFFFu, 0x3F000000u);
    std::vector<uint32_t> ids(2 * PAGES);
    for (uint32_t i = 0; i < 2 * PAGES; i++)
        ids[i] = i * 7919u % PAGES;
    buffer<uint32_t> pages(ids.size());
    pages.v = ids;
    pages.up();
    OK(cudaDeviceSynchronize());
    const times read =
        timed(10, 1, [&](cudaStream_t st, int) { de_cu_read(st, kv, (size_t)1 << 30, 4); });
    const double rate = (double)(1 << 30) / read.median * 1e-3;
    printf("read: %.0f GB/s\n", rate);
    const uint32_t fill[][2] = { { 64, 8192 },   { 64, 32768 },   { 256, 32768 },
                                 { 64, 131072 }, { 256, 131072 }, { 512, 0 },
                                 { 2048, 0 },    { 8192, 0 },     { 8192, 24576 } };
    for (auto f : fill) {
        buffer<de_cu_seq> seq(1);
        seq.v[0] = { 0, f[0], f[1], 0, 0 };
        seq.up();
        const times t = timed(7, 3, [&](cudaStream_t st, int) {
            de_cu_attn_prefill(st, a, p, WIDTH, rope, seq.d, pages.d, 1, f[0], f[0], f[0] + f[1], y,
                               work);
        });
        const double flop = 16.0 * 1024 * f[0] * (f[1] + f[0] / 2.0);
        printf("prefill %5u rows at %6u: %8.1f us (%.1f .. %.1f), %.0f TFLOP/s\n", f[0], f[1],
               t.median, t.low, t.high, flop / t.median * 1e-6);
    }
    const uint32_t step[][2] = { { 1, 100 },   { 1, 1000 },   { 1, 4000 },  { 1, 8191 },
                                 { 1, 32767 }, { 1, 131000 }, { 64, 8191 }, { 64, 1000 } };
    for (auto f : step) {
        enum { CALLS = 40 };
        buffer<de_cu_seq> seqs(CALLS * 64);
        const uint32_t each = f[1] / 64 + 1;
        for (uint32_t i = 0, page = 0; i < CALLS; i++)
            for (uint32_t k = 0; k < f[0]; k++, page = (page + each) % PAGES)
                seqs.v[i * 64 + k] = { k, 1, f[1], k, page };
        seqs.up();
        const times t = timed(7, CALLS, [&](cudaStream_t st, int i) {
            de_cu_attn_decode(st, a, p, WIDTH, rope, seqs.d + i * 64, pages.d, f[0], 131328, y,
                              work, true);
        });
        const double bytes = f[0] * (f[1] + 1.0) * 2 * 2 * D;
        printf("decode %2u at %6u: %7.2f us (%.2f .. %.2f), %.1f MB, %.0f %% of reading\n", f[0],
               f[1], t.median, t.low, t.high, bytes * 1e-6, bytes / t.median * 1e-3 / rate * 100);
    }
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    const bool small = argc > 1 && strcmp(argv[1], "--small") == 0;
    if (argc > 1 && strcmp(argv[1], "--bench") == 0) {
        bench();
        return 0;
    }
    state = argc > 1 + small ? strtoull(argv[1 + small], NULL, 10) * 2 + 1 : 1;
    for (bool fp8 : { false, true }) {
        test({ 6, 2, fp8 }, { { 5, 0 }, { 63, 3 }, { 0, 66 } });
        if (small)
            continue;
        test({ 16, 2, fp8 },
             { { 1, 0 }, { 2, 62 }, { 64, 64 }, { 65, 1 }, { 100, 200 }, { 0, 0 } });
        test({ 8, 1, fp8 }, { { 130, 127 }, { 300, 5 } });
        test({ 4, 4, fp8 }, { { 64, 0 }, { 0, 300 } });
        test({ 4, 2, fp8 }, { { 1, 1 }, { 62, 1 }, { 256, 256 } });
        test({ 2, 2, fp8 }, { { 1000, 1030 } });
        test({ 2, 1, fp8 }, { { 17000, 100 } }); /* many parts; in prefill in several rounds */
        test({ 16, 2, fp8 }, { { 64, 4036 } });  /* blocks that take several parts of 2,048 */
        test({ 4, 2, fp8 }, { { 2047, 1 }, { 2048, 1 }, { 2049, 2050 }, { 4095, 3 }, { 9, 4088 } });
        std::vector<std::pair<uint32_t, uint32_t>> many;
        for (uint32_t i = 0; i < 64; i++)
            many.push_back({ 1 + i * 5, i % 7 });
        test({ 16, 2, fp8 }, many);
    }
    printf("%d failed\n", failures);
    return failures != 0;
}
