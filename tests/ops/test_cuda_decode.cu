/* test_cuda_decode.cu -- matrices and experts (decode and tiles), the step of the delta rule and the packing of weights against
 * sums in double on the host, on fresh random inputs.
 *
 *   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I engine tests/ops/test_cuda_decode.cu \
 *        engine/kernels/cuda/{decode_linear,decode_gdn,decode_moe,linear_tile,moe_tile,pack,rows}.cu -o test_cuda_decode
 *   ./test_cuda_decode [--small] [SEED]        --small: few small shapes, for compute-sanitizer
 *   ./test_cuda_decode --bench [ROWS]          times at the shapes of 35B, 40 in a row over different weights, in a graph with
 *                                              dependent launch
 *   ./test_cuda_decode --bench-tiles [ROWS]    the same for prefill's tiles, without a graph
 *
 * Rows alone and among others must have equal bits. Exit 1 if a bound is not kept. */
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/cuda/ops.cuh"
#include "support/cuda_ok.cuh"

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
static float rounded(float v)
{
    return __bfloat162float(__float2bfloat16(v));
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
static void noise(std::vector<float> &v, float amplitude)
{
    for (float &x : v)
        x = amplitude * normal();
}

/* A matrix as stored, its values, and its fragments. */
struct matrix {
    uint32_t out, in, group;
    bool int8;
    std::vector<double> w;
    buffer<uint8_t> stored, packed;
    buffer<float> scales, packed_scales;
    de_cu_linear l;
    matrix(uint32_t out_, uint32_t in_, bool int8_, uint32_t group_, de_cu_order order = DE_CU_ROWS)
        : out(out_), in(in_), group(group_), int8(int8_), w((size_t)out_ * in_),
          stored((size_t)out_ * in_ * (int8_ ? 1 : 2)),
          packed((size_t)(out_ + 15) / 16 * 16 * in_ * (int8_ ? 1 : 2)),
          scales((size_t)out_ * (in_ / group_)),
          packed_scales((size_t)(out_ + 15) / 16 * 16 * (in_ / group_))
    {
        buffer<uint32_t> bad(1);
        for (float &s : scales.v) /* of either sign */
            s = (uniform() < 0.3 ? -1.0f : 1.0f) *
                rounded((float)(0.5 + uniform()) / (74 * sqrtf((float)in)));
        for (size_t i = 0; i < w.size(); i++) {
            if (int8) {
                const uint8_t b = uniform() < 0.01 ? 0 : (uint8_t)(uniform() * 256);
                stored.v[i] = b;
                w[i] = ((double)b - 128) * scales.v[i / in * (in / group) + i % in / group];
            } else {
                const bf16 b = __float2bfloat16(normal() / sqrtf((float)in));
                memcpy(&stored.v[i * 2], &b, 2);
                w[i] = __bfloat162float(b);
            }
        }
        stored.up();
        scales.up();
        OK(cudaMemset(packed.d, 0, packed.v.size()));
        OK(cudaMemset(packed_scales.d, 0, packed_scales.v.size() * 4));
        OK(cudaMemset(bad.d, 0, 4));
        l.w = packed.d;
        l.scale = int8 ? packed_scales.d : NULL;
        l.out = out;
        l.in = in;
        l.group = group;
        de_cu_stored from = {};
        from.type = int8 ? DE_CU_T_INT8 : DE_CU_T_BF16;
        from.w = stored.d;
        from.row_bytes = (size_t)in * (int8 ? 1 : 2);
        from.in = in;
        from.scale_type = DE_CU_T_F32;
        from.scale = (const uint8_t *)scales.d;
        from.group = group;
        const uint32_t half = order == DE_CU_ROWS ? out : out / 2, most = 32768;
        for (uint32_t r = 0; r < out;
             r += from.rows) { /* else the first half is gates, the second ups */
            from.rows = half - r % half < most ? half - r % half : most;
            de_cu_stored piece = from;
            piece.w += r * from.row_bytes;
            piece.scale += (size_t)r * (in / group) * 4;
            de_cu_pack_linear(NULL, piece, l, order == DE_CU_ROWS ? r : r % half * 2,
                              order == DE_CU_ROWS ? DE_CU_ROWS
                              : r < half          ? DE_CU_GATE
                                                  : DE_CU_UP,
                              bad.d);
        }
        bad.down();
        if (bad.v[0])
            report("packing found bad values", bad.v[0], 0);
    }
    double dot(uint32_t row, const double *x) const
    {
        double s = 0;
        for (uint32_t k = 0; k < in; k++)
            s += w[(size_t)row * in + k] * x[k];
        return s;
    }
};

static double silu(double x)
{
    return x / (1 + exp(-x));
}

/* Error of a sum: over the root of the mean square of all of them. */
struct error {
    double worst = 0, squares = 0;
    size_t n = 0;
    void add(double got, double want)
    {
        const double d = fabs(got - want);
        worst = d <= worst ? worst : d; /* NaN stays */
        if (d != d)
            worst = INFINITY;
        squares += want * want;
        n++;
    }
    double relative() const
    {
        return worst / sqrt(squares / (double)n);
    }
};

static void normed(const float *h, const float *w, uint32_t k, double *x)
{
    double s = 0;
    for (uint32_t i = 0; i < k; i++)
        s += (double)h[i] * h[i];
    s = 1 / sqrt(s / k + 1e-6);
    for (uint32_t i = 0; i < k; i++)
        x[i] = rounded((float)(h[i] * s * (1 + (double)w[i])));
}

/* y of the kind and store asked for, of n rows; with == NULL: x is made in the kernel. */
static void run_linear(const matrix &m, const de_cu_x &x, uint32_t n, bf16 *with, de_cu_store store,
                       void *y, size_t ldy)
{
    de_cu_x mine = x;
    if (with) {
        de_cu_decode_prepare(NULL, x, n, m.in, with, true);
        mine.ready = with;
    }
    de_cu_decode_linear(NULL, m.l, mine, n, store, y, ldy, { m.l.w, m.stored.v.size() }, true);
    OK(cudaGetLastError());
}

static void test_linear(uint32_t out, uint32_t in, bool int8, uint32_t group, uint32_t n)
{
    const matrix m(out, in, int8, group);
    buffer<float> h((size_t)n * in), norm(in), y((size_t)n * out), alone(out), sum((size_t)n * out);
    buffer<bf16> ready((size_t)n * in), plain((size_t)n * in);
    noise(h.v, 2);
    noise(norm.v, 0.2f);
    for (size_t i = 0; i < plain.v.size(); i++)
        plain.v[i] = __float2bfloat16(normal());
    noise(sum.v, 1);
    const std::vector<float> before = sum.v;
    h.up(), norm.up(), plain.up(), sum.up();
    de_cu_x x = { DE_CU_X_NORM, h.d, NULL, 0, norm.d, 1e-6f, NULL };
    run_linear(m, x, n, n > DE_CU_FUSED_ROWS ? ready.d : NULL, DE_CU_F32, y.d, out);
    const uint32_t pick = n / 2;
    de_cu_x one = x;
    one.f = h.d + (size_t)pick * in;
    run_linear(m, one, 1, NULL, DE_CU_F32, alone.d, out);
    de_cu_x p = { DE_CU_X_PLAIN, NULL, plain.d, in, NULL, 0, NULL };
    run_linear(m, p, n, n > DE_CU_FUSED_ROWS ? ready.d : NULL, DE_CU_ADD, sum.d, out);
    y.down(), alone.down(), sum.down();
    error norms, adds;
    std::vector<double> v(in);
    for (uint32_t r = 0; r<n; r += n> 8 ? 7 : 1) {
        normed(&h.v[(size_t)r * in], norm.v.data(), in, v.data());
        for (uint32_t o = 0; o<out; o += out> 600 ? 37 : 1)
            norms.add(y.v[(size_t)r * out + o], m.dot(o, v.data()));
        for (uint32_t i = 0; i < in; i++)
            v[i] = __bfloat162float(plain.v[(size_t)r * in + i]);
        for (uint32_t o = 0; o<out; o += out> 600 ? 41 : 1)
            adds.add(sum.v[(size_t)r * out + o], before[(size_t)r * out + o] + m.dot(o, v.data()));
    }
    char what[128];
    snprintf(what, sizeof what, "linear %u x %u %s/%u, %u rows: norm", out, in,
             int8 ? "int8" : "bf16", group, n);
    report(what, norms.relative(),
           1e-3); /* a norm on the edge of rounding may round the other way */
    report("  add", adds.relative(), 2e-6);
    report("  bits of a row alone", memcmp(&y.v[(size_t)pick * out], alone.v.data(), out * 4) != 0,
           0);
}

static void test_tile(uint32_t out, uint32_t in, bool int8, uint32_t group, uint32_t n)
{
    const matrix m(out, in, int8, group);
    buffer<bf16> x((size_t)n * in), rounded_y((size_t)n * out);
    buffer<float> y((size_t)n * out), alone(out), sum((size_t)n * out);
    for (bf16 &v : x.v)
        v = __float2bfloat16(normal());
    noise(sum.v, 1);
    const std::vector<float> before = sum.v;
    x.up(), sum.up();
    const uint32_t pick = n / 2, step = n > 8 ? n / 7 : 1;
    de_cu_linear_tile(NULL, m.l, x.d, in, n, DE_CU_F32, y.d, out);
    de_cu_linear_tile(NULL, m.l, x.d + (size_t)pick * in, in, 1, DE_CU_F32, alone.d, out);
    de_cu_linear_tile(NULL, m.l, x.d, in, n, DE_CU_ADD, sum.d, out);
    de_cu_linear_tile(NULL, m.l, x.d, in, n, DE_CU_BF16, rounded_y.d, out);
    OK(cudaGetLastError());
    y.down(), alone.down(), sum.down(), rounded_y.down();
    error plain, adds, rounds;
    std::vector<double> v(in);
    for (uint32_t r = 0; r < n; r += step) {
        for (uint32_t i = 0; i < in; i++)
            v[i] = __bfloat162float(x.v[(size_t)r * in + i]);
        for (uint32_t o = 0; o<out; o += out> 600 ? 37 : 1) {
            const double want = m.dot(o, v.data());
            const size_t at = (size_t)r * out + o;
            plain.add(y.v[at], want);
            adds.add(sum.v[at], before[at] + want);
            rounds.add(__bfloat162float(rounded_y.v[at]), y.v[at]);
        }
    }
    char what[128];
    snprintf(what, sizeof what, "tiles %u x %u %s/%u, %u rows", out, in, int8 ? "int8" : "bf16",
             group, n);
    report(what, plain.relative(), 2e-5); /* one chain of up to 128 steps */
    report("  add", adds.relative(), 2e-5);
    report("  rounded", rounds.relative(), 3.2e-2);
    report("  bits of a row alone", memcmp(&y.v[(size_t)pick * out], alone.v.data(), out * 4) != 0,
           0);
}

static void test_gdn(uint32_t K, uint32_t V, uint32_t hidden, uint32_t n)
{
    const uint32_t ch = (2 * K + V) * 128, out = ch + V * 128 + 2 * V, D = 128;
    const size_t ldp = (out + 7) / 8 * 8, slot = (size_t)V * D * D + 3 * ch;
    const matrix in(out, hidden, false, hidden), back(hidden, V * 128, false, V * 128);
    buffer<float> h((size_t)n * hidden), norm(hidden), conv(4 * ch), A(V), dt(V), gn(D),
        S((n + 1) * slot), c((size_t)n * ch), o((size_t)n * V * D), y((size_t)n * hidden);
    buffer<bf16> p(n * ldp), ready((size_t)n * (hidden > V * D ? hidden : V * D));
    buffer<de_cu_seq> seqs(n);
    noise(h.v, 1), noise(norm.v, 0.2f), noise(conv.v, 0.5f), noise(S.v, 0.3f), noise(y.v, 1);
    for (uint32_t i = 0; i < V; i++) {
        A.v[i] = -(float)exp(uniform() * 3 - 2);
        dt.v[i] = normal();
    }
    for (float &x : gn.v)
        x = 1 + 0.1f * normal();
    for (uint32_t i = 0; i < n; i++)
        seqs.v[i] = { i, 1, 100, n - i, 0 }; /* slots the other way round */
    h.up(), norm.up(), conv.up(), A.up(), dt.up(), gn.up(), S.up(), seqs.up(), y.up();
    const std::vector<float> old = S.v, old_y = y.v;
    de_cu_gdn g = { K, V, ch, conv.d, A.d, dt.d, gn.d, 1e-6f, S.d, slot };
    de_cu_x x = { DE_CU_X_NORM, h.d, NULL, 0, norm.d, 1e-6f, NULL };
    if (n > DE_CU_FUSED_ROWS) {
        de_cu_decode_prepare(NULL, x, n, hidden, ready.d, true);
        x.ready = ready.d;
    }
    de_cu_decode_gdn_in(NULL, in.l, x, n, g, seqs.d, c.d, p.d, ldp, true);
    de_cu_decode_gdn_step(NULL, g, c.d, p.d, ldp, seqs.d, n, o.d, true);
    OK(cudaGetLastError());
    c.down(), p.down(), o.down();
    de_cu_x z = { DE_CU_X_GATED_NORM, o.d, p.d + ch, ldp, gn.d, 1e-6f, NULL };
    run_linear(back, z, n, n > DE_CU_FUSED_ROWS ? ready.d : NULL, DE_CU_ADD, y.d, hidden);
    S.down(), y.down();
    error ec, eo, es, et, ey;
    for (uint32_t i = 0; i<n; i += n> 8 ? 9 : 1) {
        const float *s0 = &old[seqs.v[i].slot * slot], *s1 = &S.v[seqs.v[i].slot * slot];
        std::vector<double> v(hidden), got(V * 128);
        normed(&h.v[(size_t)i * hidden], norm.v.data(), hidden, v.data());
        for (uint32_t r = 0; r<ch; r += ch> 1000 ? 13 : 1) {
            const float *tail = s0 + (size_t)V * D * D + r, *after = s1 + (size_t)V * D * D + r;
            const double u = after[2 * ch]; /* rounded to bf16: may fall to either side */
            et.add(u, in.dot(r, v.data()));
            et.add(after[0], tail[ch]);
            et.add(after[ch], tail[2 * ch]);
            ec.add(c.v[(size_t)i * ch + r],
                   silu(conv.v[r] * (double)tail[0] + conv.v[ch + r] * (double)tail[ch] +
                        conv.v[2 * ch + r] * (double)tail[2 * ch] + conv.v[3 * ch + r] * u));
        }
        for (uint32_t hd = 0; hd < V; hd++) { /* from what the first kernel made */
            const float *q = &c.v[(size_t)i * ch + hd / (V / K) * D], *k = q + (size_t)K * D,
                        *val = &c.v[(size_t)i * ch + (2 * K + hd) * D];
            double qq = 0, kk = 0;
            for (uint32_t d = 0; d < D; d++)
                qq += (double)q[d] * q[d], kk += (double)k[d] * k[d];
            qq = 1 / sqrt(qq + 1e-6) / sqrt(128.0), kk = 1 / sqrt(kk + 1e-6);
            const double b = __bfloat162float(p.v[i * ldp + ch + V * D + hd]),
                         a = __bfloat162float(p.v[i * ldp + ch + V * D + V + hd]) + dt.v[hd];
            const double decay = exp(A.v[hd] * (a > 20 ? a : log1p(exp(a)))),
                         beta = 1 / (1 + exp(-b));
            for (uint32_t e = 0; e < D; e++) {
                double sk = 0, so = 0;
                for (uint32_t d = 0; d < D; d++)
                    sk += decay * s0[(size_t)hd * D * D + d * D + e] * k[d] * kk;
                const double delta = beta * (val[e] - sk);
                for (uint32_t d = 0; d < D; d++) {
                    const double s = decay * s0[(size_t)hd * D * D + d * D + e] + k[d] * kk * delta;
                    so += s * q[d] * qq;
                    if (e % 16 == 0)
                        es.add(s1[(size_t)hd * D * D + d * D + e], s);
                }
                eo.add(o.v[((size_t)i * V + hd) * D + e], so);
            }
            double ss = 0;
            for (uint32_t e = 0; e < D; e++)
                ss += pow(o.v[((size_t)i * V + hd) * D + e], 2);
            ss = 1 / sqrt(ss / D + 1e-6);
            for (uint32_t e = 0; e < D; e++)
                got[hd * D + e] =
                    rounded((float)(o.v[((size_t)i * V + hd) * D + e] * ss * gn.v[e] *
                                    silu(__bfloat162float(p.v[i * ldp + ch + hd * D + e]))));
        }
        for (uint32_t r = 0; r < hidden; r += 5)
            ey.add(y.v[(size_t)i * hidden + r],
                   old_y[(size_t)i * hidden + r] + back.dot(r, got.data()));
    }
    printf("DeltaNet, %u and %u heads, %u rows\n", K, V, n);
    report("  projection, in the conv tail (rounded)", et.relative(),
           3.2e-2); /* an ulp at four deviations */
    report("  conv", ec.relative(), 2e-6);
    report("  output of the delta rule", eo.relative(), 1e-5);
    report("  state", es.relative(), 1e-5);
    report("  gated norm and projection back", ey.relative(), 2e-3);
}

static void test_moe(uint32_t E, uint32_t k, uint32_t hidden, uint32_t width, uint32_t shared,
                     bool int8, bool shared_int8, uint32_t group, uint32_t n, bool ties)
{
    const matrix gu(E * 2 * width, hidden, int8,
                    int8 ? group ? group : hidden : hidden), /* E matrices */
        dn(E * hidden, width, int8, int8 ? group ? group : width : width);
    const matrix sgu(2 * shared, hidden, shared_int8, hidden, DE_CU_GATE),
        sdn(hidden, shared, shared_int8, shared);
    /* gates and ups of each expert in turn by eights: pack again, expert by expert */
    buffer<uint8_t> packed(gu.packed.v.size());
    buffer<float> scales(gu.packed_scales.v.size());
    buffer<uint32_t> bad(1);
    OK(cudaMemset(bad.d, 0, 4));
    de_cu_experts e = {};
    e.n_experts = E, e.top_k = k, e.hidden = hidden, e.width = width, e.shared_width = shared;
    e.gate_up = gu.l, e.down = dn.l, e.shared_gate_up = sgu.l, e.shared_down = sdn.l;
    e.gate_up.out = 2 * width, e.down.out = hidden;
    e.gate_up.w = packed.d, e.gate_up.scale = int8 ? scales.d : NULL;
    e.gate_up_stride = (size_t)2 * width * hidden * (int8 ? 1 : 2);
    e.down_stride = (size_t)hidden * width * (int8 ? 1 : 2);
    e.gate_up_scales = int8 ? (size_t)2 * width * (hidden / gu.group) : 0;
    e.down_scales = int8 ? (size_t)hidden * (width / dn.group) : 0;
    for (uint32_t x = 0; x < E; x++)
        for (int half = 0; half < 2; half++) {
            de_cu_stored from = {};
            const size_t row = (size_t)x * 2 * width + half * width;
            from.type = int8 ? DE_CU_T_INT8 : DE_CU_T_BF16;
            from.row_bytes = (size_t)hidden * (int8 ? 1 : 2);
            from.w = gu.stored.d + row * from.row_bytes;
            from.rows = width;
            from.in = hidden;
            from.scale_type = DE_CU_T_F32;
            from.scale = (const uint8_t *)(gu.scales.d + row * (hidden / gu.group));
            from.group = gu.group;
            de_cu_linear to = e.gate_up;
            to.w += x * e.gate_up_stride;
            to.scale = int8 ? to.scale + x * e.gate_up_scales : NULL;
            de_cu_pack_linear(NULL, from, to, 0, half ? DE_CU_UP : DE_CU_GATE, bad.d);
        }
    const size_t ldr = (E + 1 + 3) / 4 * 4;
    buffer<float> h((size_t)n * hidden), norm(hidden), router(n * ldr), one(hidden);
    buffer<bf16> ready((size_t)n * hidden);
    const bool by_decode = n <= DE_CU_DECODE_ROWS;
    buffer<uint8_t> work(by_decode ? de_cu_decode_moe_bytes(e, n) : 1);
    noise(h.v, 1), noise(norm.v, 0.2f), noise(router.v, 1.5f);
    if (ties)
        for (float &v : router.v)
            v = roundf(v);
    h.up(), norm.up(), router.up();
    const std::vector<float> before = h.v;
    const uint32_t pick = n / 3;
    OK(cudaMemcpy(one.d, h.d + (size_t)pick * hidden, hidden * 4, cudaMemcpyDeviceToDevice));
    if (by_decode) {
        de_cu_x x = { DE_CU_X_NORM, h.d, NULL, 0, norm.d, 1e-6f, NULL }, alone = x;
        if (n > DE_CU_FUSED_ROWS) {
            de_cu_decode_prepare(NULL, x, n, hidden, ready.d, true);
            x.ready = ready.d;
        }
        de_cu_decode_moe(NULL, e, x, router.d, ldr, n, h.d, work.d, true);
        OK(cudaGetLastError());
        h.down();
        alone.f = one.d;
        de_cu_decode_moe(NULL, e, alone, router.d + pick * ldr, ldr, 1, one.d, work.d, true);
        one.down();
    }
    /* the same by tiles */
    buffer<float> tiled((size_t)n * hidden), tiled_alone(hidden);
    buffer<bf16> rows((size_t)n * hidden);
    buffer<uint8_t> tile_work(de_cu_moe_tile_bytes(e, n));
    tiled.v = before;
    tiled.up();
    memcpy(tiled_alone.v.data(), &before[(size_t)pick * hidden], hidden * 4);
    tiled_alone.up();
    de_cu_norm(NULL, tiled.d, norm.d, n, hidden, 1e-6f, rows.d);
    de_cu_moe_tile(NULL, e, rows.d, router.d, ldr, n, tiled.d, tile_work.d);
    de_cu_moe_tile(NULL, e, rows.d + (size_t)pick * hidden, router.d + pick * ldr, ldr, 1,
                   tiled_alone.d, tile_work.d);
    OK(cudaGetLastError());
    tiled.down(), tiled_alone.down();
    error tile_err;
    error err;
    for (uint32_t r = 0; r<n; r += n> 8 ? 11 : 1) {
        std::vector<double> v(hidden), act(width > shared ? width : shared);
        std::vector<uint32_t> ids;
        const float *l = &router.v[r * ldr];
        normed(&before[(size_t)r * hidden], norm.v.data(), hidden, v.data());
        for (uint32_t j = 0; j < k; j++) {
            uint32_t best = E;
            for (uint32_t i = 0; i < E; i++) {
                bool taken = false;
                for (uint32_t id : ids)
                    taken |= id == i;
                if (!taken && (best == E || l[i] > l[best]))
                    best = i;
            }
            ids.push_back(best);
        }
        double sum = 0;
        for (uint32_t id : ids)
            sum += exp((double)l[id] - l[ids[0]]);
        std::vector<double> want(hidden, 0);
        for (uint32_t j = 0; j <= k; j++) {
            const bool s = j == k;
            const uint32_t w = s ? shared : width, id = s ? 0 : ids[j];
            const double p =
                s ? 1 / (1 + exp(-(double)l[E])) : exp((double)l[id] - l[ids[0]]) / sum;
            const matrix &a = s ? sgu : gu, &b = s ? sdn : dn;
            for (uint32_t i = 0; i < w; i++)
                act[i] = rounded((float)(silu(a.dot(id * 2 * w + i, v.data())) *
                                         a.dot(id * 2 * w + w + i, v.data())));
            for (uint32_t o = 0; o<hidden; o += hidden> 600 ? 61 : 1)
                want[o] += p * b.dot(id * hidden + o, act.data());
        }
        for (uint32_t o = 0; o<hidden; o += hidden> 600 ? 61 : 1) {
            const size_t at = (size_t)r * hidden + o;
            if (by_decode)
                err.add(h.v[at] - before[at], want[o]);
            tile_err.add(tiled.v[at] - before[at], want[o]);
        }
    }
    char what[128];
    snprintf(what, sizeof what, "experts %u of %u, %u x %u + %u, %s %s group %u, %u rows%s", k, E,
             hidden, width, shared, int8 ? "int8" : "bf16", shared_int8 ? "int8" : "bf16", group, n,
             ties ? ", ties" : "");
    /* act is rounded to bf16 */
    report(what, by_decode ? err.relative() : tile_err.relative(), 1e-2);
    report("  by tiles", tile_err.relative(), 1e-2);
    report("  bits of a row alone",
           (by_decode && memcmp(&h.v[(size_t)pick * hidden], one.v.data(), hidden * 4)) ||
               memcmp(&tiled.v[(size_t)pick * hidden], tiled_alone.v.data(), hidden * 4),
           0);
}

/* ---- times */

static uint8_t *pool;
static size_t pool_used;
static const size_t pool_size = (size_t)40 << 30;

template <class T> static T *take(size_t n)
{
    T *p = (T *)(pool + pool_used);
    pool_used += (n * sizeof(T) + 255) / 256 * 256;
    if (pool_used > pool_size)
        exit(2);
    return p;
}

static de_cu_linear random_linear(uint32_t out, uint32_t in, bool int8)
{
    const size_t rows = (out + 15) / 16 * 16;
    de_cu_linear l = { take<uint8_t>(rows * in * (int8 ? 1 : 2)), int8 ? take<float>(rows) : NULL,
                       out, in, in };
    de_cu_fill_linear(NULL, l, pool_used);
    return l;
}
static de_cu_experts random_experts(uint32_t E, uint32_t hidden, uint32_t width)
{
    de_cu_experts e = { E, 8, hidden, width, width };
    e.shared_gate_up = random_linear(2 * width, hidden, false);
    e.shared_down = random_linear(hidden, width, false);
    e.gate_up = random_linear(E * 2 * width, hidden, true);
    e.down = random_linear(E * hidden, width, true);
    e.gate_up.out = 2 * width, e.down.out = hidden;
    e.gate_up_stride = (size_t)2 * width * hidden, e.down_stride = (size_t)hidden * width;
    e.gate_up_scales = 2 * width, e.down_scales = hidden;
    return e;
}

template <class F> static void time_op(const char *name, double bytes, double limit, F f)
{
    enum { N = 40, REPLAYS = 20 };
    cudaStream_t st;
    cudaGraph_t g;
    cudaGraphExec_t e;
    cudaEvent_t a, b;
    float ms = 0;
    OK(cudaDeviceSynchronize());
    OK(cudaStreamCreate(&st));
    OK(cudaEventCreate(&a));
    OK(cudaEventCreate(&b));
    OK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < N; i++)
        f(st, i);
    OK(cudaStreamEndCapture(st, &g));
    OK(cudaGraphInstantiate(&e, g, 0));
    for (int i = 0; i < REPLAYS + 3; i++) {
        if (i == 3)
            OK(cudaEventRecord(a, st));
        OK(cudaGraphLaunch(e, st));
    }
    OK(cudaEventRecord(b, st));
    OK(cudaEventSynchronize(b));
    OK(cudaEventElapsedTime(&ms, a, b));
    const double t = ms * 1e-3 / N / REPLAYS;
    printf("%-34s %8.2f MB %7.2f us %6.0f GB/s %4.0f %%\n", name, bytes * 1e-6, t * 1e6,
           bytes / t * 1e-9, 100 * bytes / t / limit);
}

static int bench(uint32_t n)
{
    enum { L = 8 }; /* layers of weights in turn: some hundred MB, more than L2 holds */
    const uint32_t hidden = 2048, ch = 8192, V = 32, E = 256, width = 512;
    const double limit = 3.09e12;
    OK(cudaMalloc(&pool, pool_size));
    float *h = take<float>(64 * hidden), *norm = take<float>(4096), *c = take<float>(64 * ch),
          *o = take<float>(64 * 4096), *conv = take<float>(4 * ch), *A = take<float>(V),
          *dt = take<float>(V), *router = take<float>(64 * 260), *routed = take<float>(64 * 260);
    bf16 *p = take<bf16>(64 * 12352), *ready = take<bf16>(64 * 4096);
    const size_t slot = (size_t)V * 128 * 128 + 3 * ch;
    float *S = take<float>(64 * slot * L);
    de_cu_seq *seqs = take<de_cu_seq>(64);
    std::vector<de_cu_seq> host(64);
    for (uint32_t i = 0; i < 64; i++)
        host[i] = { i, 1, 1000, i, 0 };
    OK(cudaMemcpy(seqs, host.data(), 64 * sizeof host[0], cudaMemcpyHostToDevice));
    de_cu_fill_vector(NULL, h, 64 * hidden, -1, 1, 1);
    de_cu_fill_vector(NULL, norm, 4096, -0.1f, 0.1f, 2);
    de_cu_fill_vector(NULL, c, 64 * ch, -1, 1, 3);
    de_cu_fill_vector(NULL, o, 64 * 4096, -1, 1, 4);
    de_cu_fill_vector(NULL, conv, 4 * ch, -1, 1, 5);
    de_cu_fill_vector(NULL, A, V, -1, -0.1f, 6);
    de_cu_fill_vector(NULL, dt, V, -1, 1, 7);
    de_cu_fill_vector(NULL, router, 64 * 260, -2, 2, 8);
    de_cu_fill_rows(NULL, p, 64 * 12352, 1, 9);
    OK(cudaMemset(S, 0, 64 * slot * L * 4));
    de_cu_linear in[L], out[L], ain[L], aout[L], rt[L];
    de_cu_experts ex[L];
    for (int i = 0; i < L; i++) {
        in[i] = random_linear(12352, hidden, false);
        out[i] = random_linear(hidden, 4096, false);
        ain[i] = random_linear(9216, hidden, true);
        aout[i] = random_linear(hidden, 4096, true);
        rt[i] = random_linear(E + 1, hidden, false);
        ex[i] = random_experts(E, hidden, width);
    }
    void *work = take<uint8_t>(de_cu_decode_moe_bytes(ex[0], 64));
    auto gdn = [&](int i) {
        return de_cu_gdn{
            16, V, ch, conv, A, dt, norm, 1e-6f, S + (size_t)i % L * slot * 64, slot
        };
    };
    const bool many = n > DE_CU_FUSED_ROWS;
    de_cu_x x = { DE_CU_X_NORM, h, NULL, 0, norm, 1e-6f, NULL },
            z = { DE_CU_X_GATED_NORM, o, p + ch, 12352, norm, 1e-6f, NULL },
            y = { DE_CU_X_PLAIN, NULL, p, 12352, NULL, 0, NULL };
    if (many)
        x.ready = z.ready = y.ready = ready;
    const de_cu_ahead none = { NULL, 0 };
    const double distinct = E * (1 - pow(1 - 8.0 / E, n));
    printf("%u rows\n", n);
    time_op("DeltaNet in", 2.0 * 12352 * hidden, limit, [&](cudaStream_t st, int i) {
        de_cu_decode_gdn_in(st, in[i % L], x, n, gdn(i), seqs, c, p, 12352, true);
    });
    time_op("DeltaNet step", 8.0 * V * 128 * 128 * n, limit, [&](cudaStream_t st, int i) {
        de_cu_decode_gdn_step(st, gdn(i), c, p, 12352, seqs, n, o, true);
    });
    time_op("DeltaNet out", 2.0 * 4096 * hidden, limit, [&](cudaStream_t st, int i) {
        de_cu_decode_linear(st, out[i % L], z, n, DE_CU_ADD, h, hidden, none, true);
    });
    time_op("attention in", 9216.0 * hidden, limit, [&](cudaStream_t st, int i) {
        de_cu_decode_linear(st, ain[i % L], x, n, DE_CU_BF16, p, 12352, none, true);
    });
    time_op("attention out", 4096.0 * hidden, limit, [&](cudaStream_t st, int i) {
        de_cu_decode_linear(st, aout[i % L], y, n, DE_CU_ADD, h, hidden, none, true);
    });
    time_op("router", 2.0 * E * hidden, limit, [&](cudaStream_t st, int i) {
        de_cu_decode_linear(st, rt[i % L], x, n, DE_CU_F32, routed, 260, none, true);
    });
    time_op("experts", distinct * 3 * width * hidden + 6.0 * width * hidden, limit,
            [&](cudaStream_t st, int i) {
                de_cu_decode_moe(st, ex[i % L], x, router, 260, n, h, work, true);
            });
    time_op("router, experts fetched, experts",
            distinct * 3 * width * hidden + 6.0 * width * hidden + 2.0 * E * hidden, limit,
            [&](cudaStream_t st, int i) {
                de_cu_decode_linear(st, rt[i % L], x, n, DE_CU_F32, routed, 260,
                                    { ex[i % L].shared_gate_up.w, (size_t)6 * width * hidden },
                                    true);
                de_cu_decode_moe(st, ex[i % L], x, router, 260, n, h, work, true);
            });
    return 0;
}

/* Prefill's products at the shapes of 35B, random routing. */
static int bench_tiles(uint32_t n)
{
    enum { L = 2, TIMES = 6 };
    const uint32_t hidden = 2048, E = 256, width = 512;
    OK(cudaMalloc(&pool, pool_size));
    bf16 *x = take<bf16>((size_t)n * 4096), *p = take<bf16>((size_t)n * 12352);
    float *h = take<float>((size_t)n * hidden), *router = take<float>((size_t)n * 260);
    de_cu_fill_rows(NULL, x, (size_t)n * 4096, 1, 1);
    de_cu_fill_vector(NULL, h, n * hidden, -1, 1, 2);
    de_cu_fill_vector(NULL, router, n * 260, -2, 2, 3);
    de_cu_linear in[L], out[L], ain[L];
    de_cu_experts ex[L];
    for (int i = 0; i < L; i++) {
        in[i] = random_linear(12352, hidden, false);
        out[i] = random_linear(hidden, 4096, false);
        ain[i] = random_linear(9216, hidden, true);
        ex[i] = random_experts(E, hidden, width);
    }
    void *work = take<uint8_t>(de_cu_moe_tile_bytes(ex[0], n));
    const auto time = [&](const char *name, double flop, double bytes, auto f) {
        cudaEvent_t a, b;
        float ms = 0;
        OK(cudaEventCreate(&a));
        OK(cudaEventCreate(&b));
        f(0), f(1);
        OK(cudaEventRecord(a));
        for (int i = 0; i < TIMES; i++)
            f(i % L);
        OK(cudaEventRecord(b));
        OK(cudaEventSynchronize(b));
        OK(cudaEventElapsedTime(&ms, a, b));
        const double t = ms * 1e-3 / TIMES;
        printf("%5u rows %-16s %8.1f us %6.1f TFLOP/s %6.0f GB/s of weights\n", n, name, t * 1e6,
               flop / t * 1e-12, bytes / t * 1e-9);
    };
    const double distinct = E * (1 - pow(1 - 8.0 / E, n)), one = 6.0 * width * hidden;
    time("DeltaNet in", 2.0 * n * 12352 * hidden, 2.0 * 12352 * hidden,
         [&](int i) { de_cu_linear_tile(NULL, in[i], x, hidden, n, DE_CU_BF16, p, 12352); });
    time("DeltaNet out", 2.0 * n * 4096 * hidden, 2.0 * 4096 * hidden,
         [&](int i) { de_cu_linear_tile(NULL, out[i], x, 4096, n, DE_CU_ADD, h, hidden); });
    time("attention in", 2.0 * n * 9216 * hidden, 9216.0 * hidden,
         [&](int i) { de_cu_linear_tile(NULL, ain[i], x, hidden, n, DE_CU_BF16, p, 12352); });
    time("experts", 9.0 * n * one, (distinct / 2 + 1) * one,
         [&](int i) { de_cu_moe_tile(NULL, ex[i], x, router, 260, n, h, work); });
    OK(cudaGetLastError());
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--bench") == 0)
        return bench(argc > 2 ? (uint32_t)atoi(argv[2]) : 1);
    if (argc > 1 && strcmp(argv[1], "--bench-tiles") == 0)
        return bench_tiles(argc > 2 ? (uint32_t)atoi(argv[2]) : 8192);
    const bool small = argc > 1 && strcmp(argv[1], "--small") == 0;
    state = argc > 1 + small ? strtoull(argv[1 + small], NULL, 10) * 2 + 1 : 1;
    test_linear(17, 64, false, 64, 1);
    test_linear(1, 32, true, 32, 3);
    test_linear(257, 96, true, 32, 9);
    test_tile(17, 64, false, 64, 3);
    test_tile(300, 96, true, 32, 40);
    test_tile(264, 96, true, 96, 70);
    test_gdn(1, 2, 64, 2);
    test_moe(24, 6, 64, 64, 96, true, false, 0, 2, false);
    test_moe(64, 8, 64, 32, 32, true, false, 32, 17, true);
    if (small) {
        test_moe(8, 2, 128, 128, 128, false, false, 0, 9, false);
    } else {
        for (uint32_t n : { 1u, 2u, 8u, 9u, 16u, 33u, 64u }) {
            test_linear(12352, 2048, false, 2048, n);
            test_linear(2048, 4096, true, 4096, n);
            test_linear(257, 2048, false, 2048, n);
            test_linear(300, 256, true, 128, n);
            test_gdn(16, 32, 2048, n);
            test_moe(16, 4, 256, 64, 64, true, false, 0, n, false);
            test_moe(8, 2, 128, 128, 128, true, true, 0, n, true);
        }
        for (uint32_t n : { 1u, 7u, 63u, 64u, 65u, 128u, 500u, 2048u }) {
            test_tile(2048, 512, false, 512, n);
            test_tile(12352, 256, false, 256, n);
            test_tile(257, 2048, true, 2048, n);
            test_tile(512, 1024, true, 128, n);
        }
        test_moe(16, 4, 256, 64, 64, true, false, 0, 900, false);
        for (uint32_t n : { 65u, 129u, 1000u }) {
            test_tile(12352, 2048, false, 2048, n);
            test_tile(2048, 4096, true, 4096, n);
        }
        test_moe(16, 4, 256, 64, 64, true, false, 0, 8200, false); /* more than one slice */
        test_moe(8, 2, 256, 96, 96, false, false, 0, 700, false);  /* bf16, no whole tiles */
        test_moe(2, 2, 128, 64, 64, true, false, 0, 333, false);   /* each has all rows */
        test_moe(64, 8, 2048, 512, 512, true, false, 0, 640, false);
        test_linear(2048, 4096, false, 4096, 5);
        test_gdn(1, 4, 64, 3);
        for (uint32_t n : { 1u, 7u, 64u })
            test_moe(64, 8, 2048, 512, 512, true, false, 0, n, n == 7);
        test_moe(32, 4, 512, 1024, 1024, true, false, 128, 4, false);
        test_moe(512, 10, 256, 64, 64, true, false, 0, 12, false);
        test_moe(256, 8, 256, 64, 64, true, false, 0, 64, true);
    }
    printf("%d failed\n", failures);
    return failures != 0;
}
