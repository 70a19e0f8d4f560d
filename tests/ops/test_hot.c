/* The inner loops of the CPU backend: every instruction set gives the same bits, and all are near
 * a double-precision reference on fresh random inputs. */
#include "support/tap.h"

#include <time.h>

#include "base/bf16.h"
#include "kernels/cpu/hot.h"

static uint64_t state;
__attribute__((constructor)) static void seed(void)
{
    const char *s = getenv("TEST_SEED");
    state = s ? strtoull(s, NULL, 10) : (uint64_t)time(NULL);
    printf("# TEST_SEED=%llu\n", (unsigned long long)state);
}

static float rnd(void) /* in -1 .. 1 */
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 11) * 0x1p-52 - 1);
}

static uint32_t rnd_u(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

static float *random_floats(size_t n)
{
    float *p = aligned_alloc(64, (n + 15) / 16 * 64);
    for (size_t i = 0; i < n; i++)
        p[i] = rnd();
    return p;
}

/* Random panels; dense gets the exact weights [out, in]. */
static de_panels random_panels(enum de_panel_format f, uint32_t out, uint32_t in, uint32_t group,
                               double *dense)
{
    const size_t out16 = (out + 15) / 16 * 16, groups = in / group;
    de_panels p = { .format = f, .out = out, .in = in, .group = group };
    p.data = calloc(out16 * in, 4);
    p.scale = calloc(out16 * groups, sizeof(float));
    for (size_t i = 0; i < out16 * groups; i++)
        p.scale[i] = rnd() * 0.02f; /* of both signs */
    for (uint32_t o = 0; o < out; o++)
        for (uint32_t k = 0; k < in; k++) {
            const size_t at = ((size_t)(o / 16) * in + k) * 16 + o % 16;
            const float w = rnd();
            if (f == DE_PANEL_F32) {
                ((float *)p.data)[at] = w;
                dense[(size_t)o * in + k] = w;
            } else if (f == DE_PANEL_BF16) {
                uint32_t u;
                memcpy(&u, &w, 4);
                ((uint16_t *)p.data)[at] = (uint16_t)(u >> 16);
                dense[(size_t)o * in + k] = de_bf16_to_float((uint16_t)(u >> 16));
            } else {
                const int q = (int)rnd_u(256) - 128;
                ((int8_t *)p.data)[at] = (int8_t)q;
                dense[(size_t)o * in + k] =
                    (double)q * p.scale[((o / 16) * groups + k / group) * 16 + o % 16];
            }
        }
    return p;
}

TEST(linear_matches_double_and_has_the_same_bits_everywhere)
{
    static const struct {
        uint32_t out, in, group;
    } shapes[] = { { 16, 64, 64 },    { 1, 256, 256 }, { 37, 96, 32 },   { 256, 64, 64 },
                   { 96, 2048, 128 }, { 4, 256, 256 }, { 130, 512, 512 } };
    const de_hot *const *all = de_hot_all();
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int f = 0; f < 3; f++) {
            const uint32_t out = shapes[s].out, in = shapes[s].in, rows = 1 + rnd_u(21);
            const uint32_t group = f == DE_PANEL_INT8 ? shapes[s].group : in;
            double *dense = malloc(sizeof *dense * out * in);
            de_panels p = random_panels((enum de_panel_format)f, out, in, group, dense);
            float *x = random_floats((size_t)rows * in);
            float *y = calloc((size_t)rows * out, sizeof *y),
                  *z = calloc((size_t)rows * out, sizeof *z);
            const uint32_t panels = (out + 15) / 16;
            all[0]->linear(&p, x, in, rows, y, out, 0, panels);
            double d = 0, n = 0;
            for (uint32_t r = 0; r < rows; r++)
                for (uint32_t o = 0; o < out; o++) {
                    double sum = 0;
                    for (uint32_t k = 0; k < in; k++) {
                        const double v = dense[(size_t)o * in + k] * x[(size_t)r * in + k];
                        sum += v;
                        n +=
                            v * v; /* not the sum: its terms may cancel, and their rounding stays */
                    }
                    d += (y[r * out + o] - sum) * (y[r * out + o] - sum);
                }
            CHECK(sqrt(d / n) < 1e-6);
            for (int i = 1; all[i]; i++) { /* other instruction sets */
                all[i]->linear(&p, x, in, rows, z, out, 0, panels);
                CHECK_MEM(y, sizeof *y * rows * out, z, sizeof *z * rows * out);
            }
            for (uint32_t r = 0; r < rows; r++) /* one row at a time, panel by panel */
                for (uint32_t q = 0; q < panels; q++)
                    all[0]->linear(&p, x + (size_t)r * in, in, 1, z + (size_t)r * out, out, q,
                                   q + 1);
            CHECK_MEM(y, sizeof *y * rows * out, z, sizeof *z * rows * out);
            free(dense);
            free(p.data);
            free(p.scale);
            free(x);
            free(y);
            free(z);
        }
}

TEST(mm_matches_double_and_has_the_same_bits_everywhere)
{
    const de_hot *const *all = de_hot_all();
    for (int round = 0; round < 30; round++) {
        const uint32_t m = 1 + rnd_u(64), n = 16 * (1 + rnd_u(8)), k = 1 + rnd_u(128);
        float *a = random_floats(m * k), *b = random_floats(k * n), *c = random_floats(m * n);
        float *y = malloc(m * n * 4), *z = malloc(m * n * 4);
        memcpy(y, c, m * n * 4);
        all[0]->mm(m, n, k, a, k, b, n, y, n, 1);
        for (uint32_t i = 0; i < m; i++)
            for (uint32_t j = 0; j < n; j++) {
                double sum = c[i * n + j];
                for (uint32_t t = 0; t < k; t++)
                    sum += (double)a[i * k + t] * b[t * n + j];
                CHECK_NEAR(y[i * n + j], sum, 2e-5);
            }
        for (int i = 1; all[i]; i++) {
            memcpy(z, c, m * n * 4);
            all[i]->mm(m, n, k, a, k, b, n, z, n, 1);
            CHECK_MEM(y, m * n * 4, z, m * n * 4);
        }
        free(a);
        free(b);
        free(c);
        free(y);
        free(z);
    }
}

TEST(exp_is_within_two_ulp_and_zero_far_below)
{
    const de_hot *hot = de_hot_best();
    double worst = 0;
    for (float x = -87.2f; x < 88.0f; x += 0.00037f) {
        const double want = exp((double)x);
        const double e = fabs(hot->exp1(x) - want) / want;
        worst = e > worst ? e : worst;
    }
    printf("# largest relative error %.3g\n", worst);
    CHECK(worst < 2 * 0x1p-23);
    CHECK(hot->exp1(0) == 1);
    CHECK(hot->exp1(-100) == 0);
    CHECK(hot->exp1(-INFINITY) == 0);
}

TEST(row_functions_match_double_and_have_the_same_bits_everywhere)
{
    const de_hot *const *all = de_hot_all();
    for (int round = 0; round < 50; round++) {
        const uint32_t n = 16 * (1 + rnd_u(20));
        float *x = random_floats(n), *w = random_floats(n), *y = malloc(n * 4), *z = malloc(n * 4);
        for (uint32_t i = 0; i < n; i++)
            x[i] *= 8;
        double ss = 0;
        for (uint32_t i = 0; i < n; i++)
            ss += (double)x[i] * x[i];
        all[0]->rms_norm(y, x, w, 1, n, 1e-6f);
        for (uint32_t i = 0; i < n; i++)
            CHECK_NEAR(y[i], x[i] / sqrt(ss / n + 1e-6) * (1 + (double)w[i]), 4e-6);
        memcpy(z, x, n * 4);
        all[0]->silu_mul(z, w, n);
        for (uint32_t i = 0; i < n; i++)
            CHECK_NEAR(z[i], x[i] / (1 + exp(-(double)x[i])) * w[i], 4e-6);
        for (int v = 1; all[v]; v++) {
            float *q = malloc(n * 4);
            all[v]->rms_norm(q, x, w, 1, n, 1e-6f);
            CHECK_MEM(y, n * 4, q, n * 4);
            memcpy(q, x, n * 4);
            all[v]->silu_mul(q, w, n);
            CHECK_MEM(z, n * 4, q, n * 4);
            free(q);
        }
        free(x);
        free(w);
        free(y);
        free(z);
    }
}

TEST(gdn_step_is_the_delta_rule)
{
    /* the recurrence of one head in double */
    enum { D = 128 };
    const de_hot *const *all = de_hot_all();
    float *S = random_floats(D * D), *q = random_floats(D), *k = random_floats(D),
          *v = random_floats(D);
    const float a = 0.9f, beta = 0.7f;
    static double R[D][D], o[D];
    all[0]->l2_norm(k, D, 1e-6f, 1);
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++)
            R[i][j] = (double)a * S[i * D + j];
    for (int j = 0; j < D; j++) {
        double m = 0;
        for (int i = 0; i < D; i++)
            m += R[i][j] * k[i];
        const double d = beta * (v[j] - m);
        o[j] = 0;
        for (int i = 0; i < D; i++) {
            R[i][j] += k[i] * d;
            o[j] += R[i][j] * q[i];
        }
    }
    float out[D], other[D], *T = malloc(sizeof *T * D * D);
    memcpy(T, S, sizeof *T * D * D);
    all[0]->gdn_step(S, q, k, v, a, beta, out);
    for (int j = 0; j < D; j++)
        CHECK_NEAR(out[j], o[j], 2e-5);
    for (int v2 = 1; all[v2]; v2++) {
        float *U = malloc(sizeof *U * D * D);
        memcpy(U, T, sizeof *U * D * D);
        all[v2]->gdn_step(U, q, k, v, a, beta, other);
        CHECK_MEM(out, sizeof out, other, sizeof other);
        CHECK_MEM(S, sizeof *S * D * D, U, sizeof *U * D * D);
        free(U);
    }
    free(S);
    free(T);
    free(q);
    free(k);
    free(v);
}
