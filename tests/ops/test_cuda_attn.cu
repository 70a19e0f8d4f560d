/* test_cuda_attn.cu -- attention over pages, prefill and decode, against double on the host, from the same BF16 inputs.
 *
 *   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I engine tests/ops/test_cuda_attn.cu \
 *        engine/kernels/cuda/{attn_decode,attn_prefill}.cu -o test_cuda_attn
 *   ./test_cuda_attn [--small] [SEED]      --small: few small shapes, for compute-sanitizer
 *
 * Each sequence is computed in two prefills and then a step of decode, its pages dealt out at random. Errors are norms of
 * differences over norms, of the worst sequence. A sequence alone and among others must have equal bits. Exit 1 if a bound is
 * not kept. */
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <cuda_fp8.h>

#include "kernels/cuda/ops.cuh"

#define OK(x)                                                                                      \
    do {                                                                                           \
        const cudaError_t e_ = (x);                                                                \
        if (e_ != cudaSuccess) {                                                                   \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e_));            \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

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

/* One batch of rows [from, to) of the sequences `which` -> y of each, row by row. */
static void run(const setting &s, de_cu_attn a, const std::vector<sequence> &all,
                const std::vector<uint32_t> &which, int stage, std::vector<std::vector<bf16>> &y)
{
    uint32_t rows = 0, max_rows = 0, n_pages = 0;
    for (uint32_t i : which) {
        rows += stage == 0 ? all[i].first : stage == 1 ? all[i].second : 1;
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
        const uint32_t start = stage == 0   ? 0
                               : stage == 1 ? q.first
                                            : q.first + q.second,
                       n = stage == 0   ? q.first
                           : stage == 1 ? q.second
                                        : 1;
        memcpy(&pages.v[page], q.pages.data(), q.pages.size() * 4);
        if (n) {
            seqs.push_back({ row, n, start, i, page });
            for (size_t k = 0; k < n * s.width(); k++)
                p.v[row * s.width() + k] = __float2bfloat16(q.x[start * s.width() + k]);
            memcpy(&rope.v[(size_t)row * ROTARY], &q.rope[(size_t)start * ROTARY],
                   (size_t)n * ROTARY * 4);
            max_rows = n > max_rows ? n : max_rows;
        }
        row += n;
        page += (uint32_t)q.pages.size();
    }
    const uint32_t n_seqs = (uint32_t)seqs.size();
    buffer<de_cu_seq> s_d(n_seqs);
    buffer<uint8_t> work(stage < 2 ? de_cu_attn_prefill_bytes(a, rows)
                                   : de_cu_attn_decode_bytes(a, n_seqs));
    s_d.v = seqs;
    p.up(), rope.up(), pages.up(), s_d.up();
    if (stage < 2)
        de_cu_attn_prefill(NULL, a, p.d, s.width(), rope.d, s_d.d, pages.d, n_seqs, rows, max_rows,
                           out.d, work.d);
    else
        de_cu_attn_decode(NULL, a, p.d, s.width(), rope.d, s_d.d, pages.d, n_seqs, 40000, out.d,
                          work.d, true);
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
    std::vector<std::vector<bf16>> y(all.size()), alone(all.size());
    for (int stage = 0; stage < 3; stage++)
        run(s, a, all, everybody, stage, y);
    a.kv = again.d;
    const uint32_t pick = (uint32_t)all.size() / 2;
    for (int stage = 0; stage < 3; stage++)
        run(s, a, all, { pick }, stage, alone);
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
}

int main(int argc, char **argv)
{
    const bool small = argc > 1 && strcmp(argv[1], "--small") == 0;
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
        test({ 2, 1, fp8 }, { { 17000, 100 } }); /* parts of 512 tokens in decode */
        std::vector<std::pair<uint32_t, uint32_t>> many;
        for (uint32_t i = 0; i < 64; i++)
            many.push_back({ 1 + i * 5, i % 7 });
        test({ 16, 2, fp8 }, many);
    }
    printf("%d failed\n", failures);
    return failures != 0;
}
