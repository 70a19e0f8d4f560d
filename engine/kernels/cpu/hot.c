/* hot.c -- see hot.h. CMake compiles this file once per instruction set, with
 * DE_HOT_NAME and DE_HOT_SYMBOL set, and the flags that go with them. */
#include "kernels/cpu/hot.h"

#include <math.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
typedef int8_t b16 __attribute__((vector_size(16), aligned(1)));

#define INLINE static inline __attribute__((always_inline))

/* a * b + c, rounded once, in every lane */
INLINE v16 fma16(v16 a, v16 b, v16 c)
{
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union {
        v16 v;
        __m256 h[2];
    } x = { a }, y = { b }, z = { c };
    z.h[0] = _mm256_fmadd_ps(x.h[0], y.h[0], z.h[0]);
    z.h[1] = _mm256_fmadd_ps(x.h[1], y.h[1], z.h[1]);
    return z.v;
#else
    v16 r;
    for (int i = 0; i < 16; i++)
        r[i] = fmaf(a[i], b[i], c[i]);
    return r;
#endif
}

INLINE v16 load(const float *p)
{
    return *(const v16 *)p;
}

INLINE void store(float *p, v16 v)
{
    *(v16 *)p = v;
}

INLINE v16 all(float x)
{
    return (v16){ x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x };
}

INLINE v16 choose(i16 mask, v16 a, v16 b)
{
    return (v16)((mask & (i16)a) | (~mask & (i16)b));
}

/* Lanes summed as a tree of fixed shape. */
INLINE float sum16(v16 v)
{
    float s[16];
    store(s, v);
    for (int w = 8; w; w /= 2)
        for (int i = 0; i < w; i++)
            s[i] += s[i + w];
    return s[0];
}

/* exp(x) for x <= 88: x = n ln 2 + r, a polynomial of degree 6 on |r| <= ln2 / 2 (the Taylor
 * coefficients, the last two adjusted by a minimax fit), then n into the exponent. Under -87.3
 * the result is 0. Error below 2 ulp, tested against libm. */
INLINE v16 exp16(v16 x)
{
    const v16 magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const i16 tiny = x < all(-87.3f);
    x = choose(tiny, all(-87.3f), x);
    v16 t = fma16(x, all(1.44269504088896341f), magic);
    const i16 n = (i16)t - (i16)magic;
    t = t - magic;
    v16 r = fma16(t, all(-0.693145751953125f), x);
    r = fma16(t, all(-1.42860682030941723e-6f), r);
    v16 p = all(1.3888889225e-3f);
    p = fma16(p, r, all(8.3333337680e-3f));
    p = fma16(p, r, all(4.1666667908e-2f));
    p = fma16(p, r, all(1.6666666657e-1f));
    p = fma16(p, r, all(0.5f));
    p = fma16(p, r, all(1.0f));
    p = fma16(p, r, all(1.0f));
    v16 y = (v16)((i16)p + (n << 23));
    return choose(tiny, all(0.0f), y);
}

INLINE v16 sigmoid16(v16 x)
{
    /* exp of -|x| never overflows; the other side by symmetry */
    const i16 negative = x < all(0.0f);
    const v16 e = exp16(choose(negative, x, -x));
    const v16 d = all(1.0f) / (all(1.0f) + e);
    return choose(negative, e * d, d);
}

/* ---- linear */

/* Weights (panel, k) as floats, without scale. */
INLINE v16 weight(const de_panels *w, enum de_panel_format format, size_t at)
{
    if (format == DE_PANEL_F32)
        return load((const float *)w->data + at);
    if (format == DE_PANEL_BF16) {
        const i16 bits =
            __builtin_convertvector(*(const h16 *)((const uint16_t *)w->data + at), i16);
        return (v16)(bits << 16);
    }
#if defined(__AVX512F__)
    return (v16)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)w->data + at))));
#else
    const i16 q = __builtin_convertvector(*(const b16 *)((const int8_t *)w->data + at), i16);
    return __builtin_convertvector(q, v16);
#endif
}

/* Chains are cut every BLOCK terms and the parts added in order: the error of a long sum falls
 * with the root of the number of parts. */
enum { BLOCK = 32 };

INLINE void tile(const de_panels *w, enum de_panel_format format, int R, int P, const float *x,
                 size_t ldx, float *y, size_t ldy, uint32_t panel)
{
    const size_t in = w->in;
    const uint32_t groups = w->in / w->group;
    v16 sum[8][8];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            sum[r][p] = all(0.0f);
    for (uint32_t g = 0; g < groups; g++) {
        v16 part[8][8];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                part[r][p] = all(0.0f);
        const size_t end = ((size_t)g + 1) * w->group;
        for (size_t k0 = (size_t)g * w->group; k0 < end; k0 += BLOCK) {
            const size_t k1 = k0 + BLOCK < end ? k0 + BLOCK : end;
            v16 acc[8][8];
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++)
                    acc[r][p] = all(0.0f);
            for (size_t k = k0; k < k1; k++) {
                v16 wk[8];
                for (int p = 0; p < P; p++)
                    wk[p] = weight(w, format, (((size_t)panel + (size_t)p) * in + k) * DE_PANEL);
                for (int r = 0; r < R; r++) {
                    const v16 xk = all(x[(size_t)r * ldx + k]);
                    for (int p = 0; p < P; p++)
                        acc[r][p] = fma16(xk, wk[p], acc[r][p]);
                }
            }
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++)
                    part[r][p] = part[r][p] + acc[r][p];
        }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) {
                if (format == DE_PANEL_INT8) {
                    const size_t at = (((size_t)panel + (size_t)p) * groups + g) * DE_PANEL;
                    sum[r][p] = fma16(load(w->scale + at), part[r][p], sum[r][p]);
                } else {
                    sum[r][p] = part[r][p];
                }
            }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
            const uint32_t o = (panel + (uint32_t)p) * DE_PANEL;
            float *to = y + (size_t)r * ldy + o;
            if (o + DE_PANEL <= w->out)
                store(to, sum[r][p]);
            else
                memcpy(to, &sum[r][p], (w->out - o) * sizeof(float));
        }
}

/* The widest tile whose accumulators stay in registers. */
#if defined(__AVX512F__)
enum { WIDE_R = 8, WIDE_P = 2, ONE_P = 8 };
#else
enum { WIDE_R = 4, WIDE_P = 1, ONE_P = 4 };
#endif

INLINE void linear_format(const de_panels *w, enum de_panel_format format, const float *x,
                          size_t ldx, uint32_t rows, float *y, size_t ldy, uint32_t p0, uint32_t p1)
{
    uint32_t r0 = 0;
    for (uint32_t p = p0; p < p1 && rows >= WIDE_R;) {
        const int two = p + WIDE_P <= p1;
        for (uint32_t r = 0; r + WIDE_R <= rows; r += WIDE_R)
            if (two)
                tile(w, format, WIDE_R, WIDE_P, x + r * ldx, ldx, y + r * ldy, ldy, p);
            else
                tile(w, format, WIDE_R, 1, x + r * ldx, ldx, y + r * ldy, ldy, p);
        p += two ? WIDE_P : 1;
    }
    if (rows >= WIDE_R)
        r0 = rows / WIDE_R * WIDE_R;
    for (; r0 + 2 <= rows; r0 += 2) {
        uint32_t p = p0;
        for (; p + 2 <= p1; p += 2)
            tile(w, format, 2, 2, x + r0 * ldx, ldx, y + r0 * ldy, ldy, p);
        for (; p < p1; p++)
            tile(w, format, 2, 1, x + r0 * ldx, ldx, y + r0 * ldy, ldy, p);
    }
    for (; r0 < rows; r0++) {
        uint32_t p = p0;
        for (; p + ONE_P <= p1; p += ONE_P)
            tile(w, format, 1, ONE_P, x + r0 * ldx, ldx, y + r0 * ldy, ldy, p);
        for (; p < p1; p++)
            tile(w, format, 1, 1, x + r0 * ldx, ldx, y + r0 * ldy, ldy, p);
    }
}

static void linear(const de_panels *w, const float *x, size_t ldx, uint32_t rows, float *y,
                   size_t ldy, uint32_t p0, uint32_t p1)
{
    switch (w->format) {
    case DE_PANEL_F32:
        linear_format(w, DE_PANEL_F32, x, ldx, rows, y, ldy, p0, p1);
        break;
    case DE_PANEL_BF16:
        linear_format(w, DE_PANEL_BF16, x, ldx, rows, y, ldy, p0, p1);
        break;
    case DE_PANEL_INT8:
        linear_format(w, DE_PANEL_INT8, x, ldx, rows, y, ldy, p0, p1);
        break;
    }
}

/* ---- small dense products */

INLINE void mm_tile(int R, int P, uint32_t k, const float *a, size_t lda, const float *b,
                    size_t ldb, float *c, size_t ldc, int add)
{
    v16 acc[8][4];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            acc[r][p] = add ? load(c + (size_t)r * ldc + p * 16) : all(0.0f);
    for (uint32_t i = 0; i < k; i++) {
        v16 bk[4];
        for (int p = 0; p < P; p++)
            bk[p] = load(b + (size_t)i * ldb + p * 16);
        for (int r = 0; r < R; r++) {
            const v16 ak = all(a[(size_t)r * lda + i]);
            for (int p = 0; p < P; p++)
                acc[r][p] = fma16(ak, bk[p], acc[r][p]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            store(c + (size_t)r * ldc + p * 16, acc[r][p]);
}

static void mm(uint32_t m, uint32_t n, uint32_t k, const float *a, size_t lda, const float *b,
               size_t ldb, float *c, size_t ldc, int add)
{
    uint32_t r = 0;
    for (; r + WIDE_R <= m; r += WIDE_R) {
        uint32_t j = 0;
        for (; j + WIDE_P * 16 <= n; j += WIDE_P * 16)
            mm_tile(WIDE_R, WIDE_P, k, a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, add);
        for (; j < n; j += 16)
            mm_tile(WIDE_R, 1, k, a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, add);
    }
    for (; r < m; r++) {
        uint32_t j = 0;
        for (; j + 64 <= n; j += 64)
            mm_tile(1, 4, k, a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, add);
        for (; j < n; j += 16)
            mm_tile(1, 1, k, a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, add);
    }
}

/* ---- rows */

INLINE float sum_squares(const float *x, uint32_t n)
{
    v16 s = all(0.0f);
    for (uint32_t i = 0; i < n; i += 16)
        s = fma16(load(x + i), load(x + i), s);
    return sum16(s);
}

static void rms_norm(float *y, const float *x, const float *w, float bias, uint32_t n, float eps)
{
    const v16 r = all(1.0f / sqrtf(sum_squares(x, n) / (float)n + eps));
    for (uint32_t i = 0; i < n; i += 16)
        store(y + i, load(x + i) * r * (load(w + i) + all(bias)));
}

static void l2_norm(float *x, uint32_t n, float eps, float s)
{
    const v16 r = all(s / sqrtf(sum_squares(x, n) + eps));
    for (uint32_t i = 0; i < n; i += 16)
        store(x + i, load(x + i) * r);
}

#define MAP(n, BODY)                                                                               \
    do {                                                                                           \
        for (uint32_t i = 0; i < (n); i += 16)                                                     \
            BODY;                                                                                  \
    } while (0)

static void silu(float *x, uint32_t n)
{
    MAP(n, store(x + i, load(x + i) * sigmoid16(load(x + i))));
}

static void silu_mul(float *y, const float *x, uint32_t n)
{
    MAP(n, store(y + i, load(y + i) * sigmoid16(load(y + i)) * load(x + i)));
}

static void mul_silu(float *y, const float *z, uint32_t n)
{
    MAP(n, store(y + i, load(y + i) * (load(z + i) * sigmoid16(load(z + i)))));
}

static void mul_sigmoid(float *y, const float *g, uint32_t n)
{
    MAP(n, store(y + i, load(y + i) * sigmoid16(load(g + i))));
}

static void axpy(float *y, const float *x, float a, uint32_t n)
{
    MAP(n, store(y + i, fma16(all(a), load(x + i), load(y + i))));
}

static void scale(float *y, float a, uint32_t n)
{
    MAP(n, store(y + i, load(y + i) * all(a)));
}

static float exp64(float *s, float max)
{
    v16 sum = all(0.0f);
    for (int i = 0; i < 64; i += 16) {
        const v16 e = exp16(load(s + i) - all(max));
        store(s + i, e);
        sum = sum + e;
    }
    return sum16(sum);
}

static float exp1(float x)
{
    return exp16(all(x))[0];
}

static void conv4(float *c, const float *const u[4], const float *w, uint32_t channels)
{
    for (uint32_t i = 0; i < channels; i += 16) {
        v16 s = load(w + i) * load(u[0] + i);
        for (uint32_t j = 1; j < 4; j++)
            s = fma16(load(w + j * channels + i), load(u[j] + i), s);
        store(c + i, s * sigmoid16(s));
    }
}

static void gdn_step(float *S, const float *q, const float *k, const float *v, float a, float beta,
                     float *o)
{
    enum { D = 128 };
    for (int j = 0; j < D; j += 64) { /* four vectors of S' columns in flight */
        v16 m[4], out[4];
        for (int p = 0; p < 4; p++)
            m[p] = out[p] = all(0.0f);
        for (int i = 0; i < D; i++)
            for (int p = 0; p < 4; p++) {
                const v16 s = load(S + i * D + j + p * 16) * all(a);
                store(S + i * D + j + p * 16, s);
                m[p] = fma16(all(k[i]), s, m[p]);
            }
        for (int p = 0; p < 4; p++)
            m[p] = all(beta) * (load(v + j + p * 16) - m[p]);
        for (int i = 0; i < D; i++)
            for (int p = 0; p < 4; p++) {
                const v16 s = fma16(all(k[i]), m[p], load(S + i * D + j + p * 16));
                store(S + i * D + j + p * 16, s);
                out[p] = fma16(all(q[i]), s, out[p]);
            }
        for (int p = 0; p < 4; p++)
            store(o + j + p * 16, out[p]);
    }
}

extern const de_hot DE_HOT_SYMBOL;
const de_hot DE_HOT_SYMBOL = {
    .name = DE_HOT_NAME,
    .linear = linear,
    .mm = mm,
    .rms_norm = rms_norm,
    .l2_norm = l2_norm,
    .silu = silu,
    .silu_mul = silu_mul,
    .mul_silu = mul_silu,
    .mul_sigmoid = mul_sigmoid,
    .exp64 = exp64,
    .conv4 = conv4,
    .gdn_step = gdn_step,
    .axpy = axpy,
    .scale = scale,
    .exp1 = exp1,
};
