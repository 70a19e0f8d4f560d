/* hot.h -- the inner loops of the CPU backend, compiled once per instruction set.
 *
 * Every sum is a chain of fused multiply-adds in a fixed order, vectorised over
 * outputs and never over the summed index. So a result has the same bits on
 * every instruction set, for any number of rows, any batch mates and threads.
 * (Row norms, which must sum along the row, use 16 lanes and a fixed tree.)
 *
 * All arrays are f32 unless said otherwise. Panels: 16 outputs wide. Lengths of
 * rows are multiples of 16 (de_model_open() checks the widths). */
#ifndef DE_HOT_H
#define DE_HOT_H

#include <stddef.h>
#include <stdint.h>

enum { DE_PANEL = 16 };

enum de_panel_format { DE_PANEL_F32, DE_PANEL_BF16, DE_PANEL_INT8 };

/* A linear's weights in panels: element (o, k) at data[(o / 16 * in + k) * 16 + o % 16]. Outputs
 * are padded to a multiple of 16 with zeros. */
typedef struct de_panels {
    enum de_panel_format format;
    uint32_t out, in, group; /* group divides in; in where there is one scale a row */
    void *data;              /* float, bf16 bits or int8 */
    float *scale;            /* INT8: [panels][in / group][16] */
} de_panels;

typedef struct de_hot {
    const char *name;
    /* y[r, o] = sum_k x[r, k] w[o, k] for the outputs of panels [p0, p1); ldx, ldy count floats */
    void (*linear)(const de_panels *w, const float *x, size_t ldx, uint32_t rows, float *y,
                   size_t ldy, uint32_t p0, uint32_t p1);
    /* c[m, n] (+)= sum_k a[m, k] b[k, n]; n a multiple of 16; add: start from c, else from 0 */
    void (*mm)(uint32_t m, uint32_t n, uint32_t k, const float *a, size_t lda, const float *b,
               size_t ldb, float *c, size_t ldc, int add);
    /* y = x / sqrt(mean(x^2) + eps) * (w + bias); n a multiple of 16 */
    void (*rms_norm)(float *y, const float *x, const float *w, float bias, uint32_t n, float eps);
    /* x scaled to x * s / sqrt(sum(x^2) + eps) */
    void (*l2_norm)(float *x, uint32_t n, float eps, float s);
    void (*silu)(float *x, uint32_t n);                        /* in place */
    void (*silu_mul)(float *y, const float *x, uint32_t n);    /* y = silu(y) * x */
    void (*mul_silu)(float *y, const float *z, uint32_t n);    /* y = y * silu(z) */
    void (*mul_sigmoid)(float *y, const float *g, uint32_t n); /* y = y * sigmoid(g) */
    /* s[i] = exp(s[i] - max), i < 64; returns the sum in a fixed order */
    float (*exp64)(float *s, float max);
    /* c[ch] = silu(sum_j w[j][ch] u_j[ch]), four inputs, oldest first */
    void (*conv4)(float *c, const float *const u[4], const float *w, uint32_t channels);
    /* One step of the delta rule on S [128 k][128 v]: S *= a; d = beta (v - S'k); S += k d'; o = S'q */
    void (*gdn_step)(float *S, const float *q, const float *k, const float *v, float a, float beta,
                     float *o);
    /* y += a * x */
    void (*axpy)(float *y, const float *x, float a, uint32_t n);
    void (*scale)(float *y, float a, uint32_t n);
    float (*exp1)(float x); /* the same exp, one value */
} de_hot;

/* The best for this processor; de_hot_all: every one it can run, NULL-terminated (tests). */
const de_hot *de_hot_best(void);
const de_hot *const *de_hot_all(void);

#endif
