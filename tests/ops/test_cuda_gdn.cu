/* test_cuda_gdn.cu -- the chunked delta rule against its recurrent form in double on the host, from the same BF16 inputs.
 *
 *   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I engine tests/ops/test_cuda_gdn.cu \
 *        engine/kernels/cuda/gdn_chunk.cu -o test_cuda_gdn
 *   ./test_cuda_gdn [--small | --bench] [SEED]   --small: two small shapes, for compute-sanitizer; --bench: times only
 *
 * Errors are norms of differences over norms, the largest over sequences and heads. A sequence alone and among others, and a
 * prefill whole and cut at multiples of 64, must have equal bits; what is not the batch's is not touched. Exit 1 if a bound is not
 * kept. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/cuda/ops.cuh"
#include "support/cuda_ok.cuh"

enum { D = DE_CU_GDN };

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
    printf("%-64s %.2e, at most %.0e %s\n", what, error, bound, good ? "pass" : "FAIL");
    failures += !good;
}

template <class T> struct buffer { /* the same on host and device */
    std::vector<T> v;
    T *d = NULL;
    explicit buffer(size_t n) : v(n)
    {
        OK(cudaMalloc(&d, n * sizeof(T) + 16));
        OK(cudaMemset(d, 0xFF, n * sizeof(T))); /* what is not written is not a number */
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

struct range { /* rows of one sequence: how many, the first one's position */
    uint32_t n, start;
};

/* One layer with random weights; a slot for each sequence and two more. Gates of head h: A 1 .. 16 and dt_bias such that a row
 * keeps nearly everything, about half, or nothing of the state. */
struct layer {
    uint32_t K, V, ch, n_slots;
    size_t ldp, slot_floats;
    buffer<float> conv, A, dt, norm, slots;
    de_cu_gdn g;

    layer(uint32_t k_heads, uint32_t v_heads, uint32_t slots_)
        : K(k_heads), V(v_heads), ch((2 * k_heads + v_heads) * D), n_slots(slots_),
          ldp((ch + (size_t)v_heads * D + 2 * v_heads + 7) / 8 * 8),
          slot_floats((size_t)v_heads * D * D + 3 * (size_t)ch + 64), conv(4 * (size_t)ch),
          A(v_heads), dt(v_heads), norm(D), slots(slots_ * slot_floats)
    {
        static const float open[] = { -7, 0, 8 };
        for (float &x : conv.v)
            x = 0.5f * normal();
        for (float &x : norm.v)
            x = 1 + 0.2f * normal();
        for (uint32_t h = 0; h < V; h++) {
            A.v[h] = (float)(-1 - 15 * uniform());
            dt.v[h] = open[h % 3];
        }
        for (float &x : slots.v)
            x = normal();
        conv.up(), norm.up(), A.up(), dt.up(), slots.up();
        g = { K, V, ch, conv.d, A.d, dt.d, norm.d, 1e-6f, slots.d, slot_floats };
    }
};

/* Keys of neighbours look alike, as those of a text do. */
static void fill_rows(std::vector<bf16> &p, const layer &l, size_t rows)
{
    std::vector<float> common(l.ldp);
    for (float &x : common)
        x = normal();
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < l.ldp; i++)
            p[r * l.ldp + i] = __float2bfloat16(0.7f * common[i] + normal());
}

/* Runs the rows of p, from row `from` on, as sequences with these slots. */
static void run(const layer &l, const bf16 *p, bf16 *y, const std::vector<range> &seqs,
                const std::vector<uint32_t> &slots)
{
    buffer<de_cu_seq> s(seqs.size());
    uint32_t rows = 0, most = 0;
    for (size_t i = 0; i < seqs.size(); i++) {
        s.v[i] = { rows, seqs[i].n, seqs[i].start, slots[i], 0 };
        rows += seqs[i].n;
        most = std::max(most, seqs[i].n);
    }
    s.up();
    buffer<uint8_t> work(de_cu_gdn_chunk_bytes(l.g, rows, (uint32_t)seqs.size()));
    de_cu_gdn_chunk(NULL, l.g, p, l.ldp, s.d, (uint32_t)seqs.size(), rows, most, y, work.d);
    OK(cudaGetLastError());
    OK(cudaDeviceSynchronize());
}

static double silu(double x)
{
    return x / (1 + exp(-x));
}

/* n rows of a sequence: y [n][V * D], and S [V][D][D] and tail [3][ch] as they become. */
static void recurrent(const layer &l, const bf16 *p, uint32_t n, std::vector<double> &S,
                      std::vector<double> &tail, std::vector<double> &y)
{
    const uint32_t K = l.K, V = l.V, ch = l.ch;
    std::vector<double> u(tail), c(ch), o(D);
    for (uint32_t t = 0; t < n; t++)
        for (uint32_t i = 0; i < ch; i++)
            u.push_back(__bfloat162float(p[t * l.ldp + i]));
    y.assign((size_t)n * V * D, 0);
    for (uint32_t t = 0; t < n; t++) {
        const bf16 *row = p + t * l.ldp;
        for (uint32_t i = 0; i < ch; i++) {
            double x = 0;
            for (uint32_t k = 0; k < 4; k++)
                x += l.conv.v[(size_t)k * ch + i] * u[(size_t)(t + k) * ch + i];
            c[i] = silu(x);
        }
        for (uint32_t h = 0; h < 2 * K; h++) {
            double sum = 1e-6;
            for (uint32_t d = 0; d < D; d++)
                sum += c[h * D + d] * c[h * D + d];
            for (uint32_t d = 0; d < D; d++)
                c[h * D + d] *= (h < K ? 1 / sqrt((double)D) : 1) / sqrt(sum);
        }
        for (uint32_t h = 0; h < V; h++) {
            const double *q = &c[h / (V / K) * D], *k = q + K * D, *v = &c[(2 * K + h) * D];
            const double b = __bfloat162float(row[ch + V * D + h]),
                         a = __bfloat162float(row[ch + V * D + V + h]);
            const double keep = exp(l.A.v[h] * log1p(exp(a + l.dt.v[h]))), beta = 1 / (1 + exp(-b));
            double *s = &S[(size_t)h * D * D], d[D];
            for (uint32_t j = 0; j < D; j++)
                d[j] = o[j] = 0;
            for (uint32_t i = 0; i < D; i++)
                for (uint32_t j = 0; j < D; j++) {
                    s[i * D + j] *= keep;
                    d[j] += k[i] * s[i * D + j];
                }
            for (uint32_t j = 0; j < D; j++)
                d[j] = beta * (v[j] - d[j]);
            for (uint32_t i = 0; i < D; i++)
                for (uint32_t j = 0; j < D; j++) {
                    s[i * D + j] += k[i] * d[j];
                    o[j] += q[i] * s[i * D + j];
                }
            double sum = 0;
            for (uint32_t j = 0; j < D; j++)
                sum += o[j] * o[j];
            for (uint32_t j = 0; j < D; j++)
                y[((size_t)t * V + h) * D + j] = o[j] / sqrt(sum / D + 1e-6) * l.norm.v[j] *
                                                 silu(__bfloat162float(row[ch + h * D + j]));
        }
    }
    std::copy(u.end() - 3 * (ptrdiff_t)ch, u.end(), tail.begin());
}

static double relative(const std::vector<double> &a, const std::vector<double> &b)
{
    double d = 0, n = 0;
    for (size_t i = 0; i < a.size(); i++) {
        d += (a[i] - b[i]) * (a[i] - b[i]);
        n += b[i] * b[i];
    }
    return std::isfinite(d) ? sqrt(d / n)
                            : INFINITY; /* a NaN would be below any bound's comparison */
}

static std::vector<uint32_t> backwards(size_t n) /* slots n .. 1: 0 and n + 1 stay */
{
    std::vector<uint32_t> s;
    for (size_t i = 0; i < n; i++)
        s.push_back((uint32_t)(n - i));
    return s;
}

static void compare(uint32_t K, uint32_t V, const std::vector<range> &seqs)
{
    layer l(K, V, (uint32_t)seqs.size() + 2);
    uint32_t rows = 0;
    for (const range &r : seqs)
        rows += r.n;
    buffer<bf16> p(rows * l.ldp), y((size_t)(rows + 1) * V * D);
    fill_rows(p.v, l, rows);
    p.up();
    const std::vector<float> before = l.slots.v;
    const std::vector<uint32_t> slots = backwards(seqs.size());
    run(l, p.d, y.d, seqs, slots);
    y.down();
    l.slots.down();

    double error_y = 0, error_S = 0, error_tail = 0, touched = 0;
    const size_t floats = (size_t)V * D * D;
    uint32_t row = 0;
    for (size_t i = 0; i < seqs.size(); i++) {
        const float *from = &before[slots[i] * l.slot_floats],
                    *is = &l.slots.v[slots[i] * l.slot_floats];
        std::vector<double> S(from, from + floats), tail(from + floats, from + floats + 3 * l.ch),
            want;
        recurrent(l, &p.v[row * l.ldp], seqs[i].n, S, tail, want);
        for (uint32_t h = 0; h < V; h++) {
            std::vector<double> a, b;
            for (uint32_t t = 0; t < seqs[i].n; t++)
                for (uint32_t j = 0; j < D; j++) {
                    a.push_back(__bfloat162float(y.v[((size_t)(row + t) * V + h) * D + j]));
                    b.push_back(want[((size_t)t * V + h) * D + j]);
                }
            error_y = std::max(error_y, relative(a, b));
            const size_t at = (size_t)h * D * D;
            error_S = std::max(error_S, relative({ is + at, is + at + D * D },
                                                 { S.begin() + at, S.begin() + at + D * D }));
        }
        for (size_t j = 0; j < tail.size(); j++)
            error_tail = std::max(error_tail, fabs(is[floats + j] - tail[j]));
        touched += memcmp(is + floats + tail.size(), from + floats + tail.size(), 64 * 4) != 0;
        row += seqs[i].n;
    }
    for (size_t slot : { (size_t)0, seqs.size() + 1 })
        touched += memcmp(&l.slots.v[slot * l.slot_floats], &before[slot * l.slot_floats],
                          l.slot_floats * sizeof(float)) != 0;
    for (size_t i = (size_t)rows * V * D; i < y.v.size(); i++)
        touched += *(const uint16_t *)&y.v[i] != 0xFFFF;
    char what[256];
    int at = snprintf(what, sizeof what, "heads %u/%u, rows", K, V);
    for (const range &r : seqs)
        at += snprintf(what + at, sizeof what - at, " %u@%u", r.n, r.start);
    puts(what);
    report("  y", error_y, 1.5e-2); /* of one row the norm may divide by next to nothing */
    report("  S", error_S, 4e-3);
    report("  conv tail", error_tail, 0);
    report("  places written that are not the batch's", touched, 0);
}

/* The same rows as one call and as several; slots and y must have the same bits. */
static void same(const char *what, layer &l, const std::vector<std::vector<range>> &calls,
                 const std::vector<std::vector<uint32_t>> &slots, const std::vector<range> &whole,
                 const std::vector<uint32_t> &whole_slots)
{
    uint32_t rows = 0;
    for (const range &r : whole)
        rows += r.n;
    buffer<bf16> p(rows * l.ldp), y((size_t)rows * l.V * D), z((size_t)rows * l.V * D);
    fill_rows(p.v, l, rows);
    p.up();
    const std::vector<float> before = l.slots.v;
    run(l, p.d, y.d, whole, whole_slots);
    l.slots.down();
    const std::vector<float> after = l.slots.v;
    l.slots.v = before;
    l.slots.up();
    size_t row = 0;
    for (size_t i = 0; i < calls.size(); i++) {
        run(l, p.d + row * l.ldp, z.d + row * l.V * D, calls[i], slots[i]);
        for (const range &r : calls[i])
            row += r.n;
    }
    l.slots.down();
    y.down();
    z.down();
    report(what,
           (memcmp(y.v.data(), z.v.data(), y.v.size() * sizeof(bf16)) != 0) +
               2 * (memcmp(l.slots.v.data(), after.data(), after.size() * sizeof(float)) != 0),
           0);
    l.slots.v = before;
    l.slots.up();
}

static void bits(uint32_t K, uint32_t V, bool small)
{
    layer l(K, V, 8);
    const uint32_t n = small ? 70 : 333;
    same("cut at multiples of 64, equal bits", l,
         small
             ? std::vector<std::vector<range>>{ { { 44, 20 } }, { { 26, 64 } } }
             : std::vector<std::vector<range>>{ { { 44, 20 } }, { { 64, 64 } }, { { 225, 128 } } },
         { { 1 }, { 1 }, { 1 } }, { { n, 20 } }, { 1 });
    same("alone and among others, equal bits", l, { { { 5, 0 } }, { { n, 40 } }, { { 64, 64 } } },
         { { 3 }, { 0 }, { 2 } }, { { 5, 0 }, { n, 40 }, { 64, 64 } }, { 3, 0, 2 });
}

static void bench(uint32_t n_seqs, uint32_t rows_each)
{
    const uint32_t K = 16, V = 32, rows = n_seqs * rows_each;
    layer l(K, V, n_seqs);
    buffer<bf16> p(rows * l.ldp), y((size_t)rows * V * D);
    for (size_t i = 0; i < p.v.size(); i++) /* from a short list: times do not depend on values */
        p.v[i] = i < 65536 ? __float2bfloat16(normal()) : p.v[i - 65521];
    p.up();
    buffer<de_cu_seq> s(n_seqs);
    for (uint32_t i = 0; i < n_seqs; i++)
        s.v[i] = { i * rows_each, rows_each, 0, i, 0 };
    s.up();
    buffer<uint8_t> work(de_cu_gdn_chunk_bytes(l.g, rows, n_seqs));
    cudaEvent_t e[2];
    OK(cudaEventCreate(&e[0]));
    OK(cudaEventCreate(&e[1]));
    std::vector<float> us;
    for (int i = 0; i < 12; i++) {
        OK(cudaEventRecord(e[0]));
        for (int k = 0; k < 4; k++)
            de_cu_gdn_chunk(NULL, l.g, p.d, l.ldp, s.d, n_seqs, rows, rows_each, y.d, work.d);
        OK(cudaEventRecord(e[1]));
        OK(cudaEventSynchronize(e[1]));
        float ms;
        OK(cudaEventElapsedTime(&ms, e[0], e[1]));
        if (i >= 2)
            us.push_back(ms * 1000 / 4);
    }
    OK(cudaGetLastError());
    std::sort(us.begin(), us.end());
    const double median = us[us.size() / 2];
    /* p is read, y written, a state read and written; 6 D^2 + 5 * 64 D products a row and value head, 64 D for two of a key head */
    const double bytes = (double)rows * (l.ldp + V * D) * 2 + 2.0 * n_seqs * l.slot_floats * 4;
    const double flops = 2.0 * rows * (V * (3.0 * D * D + 2 * 64 * D) + K * 2.0 * 64 * D);
    const double limit =
        std::max(bytes / 3.35e6, flops / 989e6); /* us at an H100's 3.35 TB/s, 989 TF */
    printf(
        "%3u x %5u rows: %8.1f us (%.1f .. %.1f), %6.1f MB, %6.1f GF, %5.1f us at the limit, %.1f "
        "times; workspace %zu MB\n",
        n_seqs, rows_each, median, us.front(), us.back(), bytes / 1e6, flops / 1e9, limit,
        median / limit, work.v.size() >> 20);
    (void)cudaEventDestroy(e[0]);
    (void)cudaEventDestroy(e[1]);
}

int main(int argc, char **argv)
{
    bool small = false, times = false;
    for (int i = 1; i < argc; i++) {
        small |= !strcmp(argv[i], "--small");
        times |= !strcmp(argv[i], "--bench");
        if (argv[i][0] != '-')
            state = strtoull(argv[i], NULL, 10) * 2 + 1;
    }
    if (times) {
        for (uint32_t rows : { 512u, 2048u, 8192u, 16384u })
            bench(1, rows);
        bench(8, 256);
        bench(64, 64);
        return 0;
    }
    compare(1, 2, { { 65, 30 }, { 2, 0 } });
    bits(1, 1, true);
    if (!small) {
        compare(16, 32, { { 1, 0 }, { 2, 5 }, { 63, 1 }, { 64, 64 }, { 65, 100 }, { 130, 7 } });
        compare(1, 4, { { 1000, 33 } });
        compare(2, 2, { { 130, 64 }, { 1, 63 }, { 3, 62 }, { 64, 0 } });
        compare(1, 3, { { 63, 5 }, { 64, 1 }, { 65, 63 } });
        compare(2, 4, { { 1000, 0 }, { 200, 17 } });
        std::vector<range> many;
        for (uint32_t i = 0; i < 70; i++)
            many.push_back({ 1 + i % 9, i * 7 });
        compare(1, 2, many);
        bits(2, 4, false);
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
