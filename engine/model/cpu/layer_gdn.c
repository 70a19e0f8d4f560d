/* layer_gdn.c -- one Gated DeltaNet mixer: m->x [T, hidden] -> m->y [T, hidden].
 *
 *   u = x Wqkv, z = x Wz, beta = sigmoid(x Wb), g = -exp(A_log) softplus(x Wa + dt_bias)
 *   c = silu(conv4(u));  q, k, v = c;  q, k l2-normed, q * 128^-0.5
 *   S = exp(g) S;  d = beta (v - S'k);  S += k d';  o = S'q      (per value head)
 *   y = (gated_norm(o) * silu(z)) Wout
 *
 * One row: the recurrence itself. Several: the chunked form over at most 64
 * rows, cut where the position in the sequence is a multiple of 64:
 *
 *   G_i = sum_{j<=i} g_j;  A_ij = beta_i (k_i.k_j) exp(G_i - G_j), j < i
 *   (I + A) V' = beta V - (beta exp(G) K) S      by forward substitution
 *   O = (exp(G) Q) S + tril((Q K') exp(G_i - G_j)) V'
 *   S = exp(G_C) S + (exp(G_C - G) K)' V' */
#include <math.h>
#include <string.h>

#include "model/cpu/model.h"

enum { D = DE_GDN_DIM, C = DE_CHUNK };
_Static_assert(C == 64, "exp64() takes the gates of a chunk at once");

typedef struct gdn_job {
    de_cpu_model *m;
    const de_layer *l;
    const de_batch *batch;
} gdn_job;

/* The last three inputs behind n rows, of tail followed by u; to may be tail. */
static void keep_tail(const float *tail, const float *u, uint32_t ch, uint32_t n, float *to)
{
    for (uint32_t i = 0; i < 3; i++) {
        const uint32_t at = n + i;
        const float *from = at >= 3 ? u + (size_t)(at - 3) * ch : tail + (size_t)at * ch;
        memmove(to + (size_t)i * ch, from, ch * sizeof *to);
    }
}

/* Conv, SiLU and norms of one sequence: wide[0] (u) -> wide[1] (q, k, v), and the conv state. */
static void conv_task(void *arg, uint32_t task, uint32_t thread)
{
    (void)thread;
    const gdn_job *j = arg;
    de_cpu_model *m = j->m;
    const de_shape *s = &m->shape;
    const de_batch_seq *q = &j->batch->seqs[task];
    const uint32_t ch = s->gdn_channels, K = s->gdn_k_heads;
    float *tail = de_slot_conv(m, q->slot, j->l->index);
    const float *u = m->wide[0] + (size_t)q->row * ch;
    for (uint32_t t = 0; t < q->n_rows; t++) {
        const float *in[4];
        for (uint32_t i = 0; i < 4; i++)
            in[i] = t + i >= 3 ? u + (size_t)(t + i - 3) * ch : tail + (size_t)(t + i) * ch;
        float *c = m->wide[1] + ((size_t)q->row + t) * ch;
        m->hot->conv4(c, in, j->l->conv, ch);
        for (uint32_t h = 0; h < K; h++) {
            m->hot->l2_norm(c + h * D, D, 1e-6f, 0.08838834764831845f);
            m->hot->l2_norm(c + (K + h) * D, D, 1e-6f, 1.0f);
        }
    }
    for (uint32_t k = 0; k < q->n_marks; k++)
        keep_tail(tail, u, ch, q->marks[k].end - q->start,
                  de_slot_conv(m, q->marks[k].slot, j->l->index));
    keep_tail(tail, u, ch, q->n_rows, tail);
}

static double softplus(double x)
{
    return x > 20 ? x : log1p(exp(x));
}

static void gates(const gdn_job *j, uint32_t row, uint32_t head, float *g, float *beta)
{
    const size_t at = (size_t)row * j->m->shape.gdn_v_heads + head;
    const double b = j->m->small[0][at], a = j->m->small[1][at];
    *beta = (float)(1 / (1 + exp(-b)));
    *g = (float)(j->l->neg_exp_A[head] * softplus(a + j->l->dt_bias[head]));
}

/* n <= 64 rows from batch row `row` on, of one value head. */
static void chunk(const gdn_job *j, uint32_t row, uint32_t n, uint32_t head, float *S, float *w)
{
    de_cpu_model *m = j->m;
    const de_hot *hot = m->hot;
    const de_shape *s = &m->shape;
    const uint32_t ch = s->gdn_channels, K = s->gdn_k_heads;
    const uint32_t kh = head / (s->gdn_v_heads / K);
    const size_t ldo = (size_t)s->gdn_v_heads * D;
    float *Q = w, *Kc = Q + C * D, *R = Kc + C * D, *X = R + C * D, *Kt = X + C * D;
    float *QK = Kt + D * C, *KK = QK + C * C, *G = KK + C * C, *beta = G + C;
    float *gamma = beta + C, *decay = gamma + C;
    const float *c = m->wide[1] + (size_t)row * ch;
    float *o = m->mixed + (size_t)row * ldo + head * D;

    memset(Kt, 0, sizeof *Kt * D * C); /* rows past n: whole vectors are read */
    float sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        float g;
        gates(j, row + i, head, &g, &beta[i]);
        sum += g;
        G[i] = sum;
        memcpy(Q + i * D, c + (size_t)i * ch + kh * D, D * sizeof *Q);
        memcpy(Kc + i * D, c + (size_t)i * ch + (K + kh) * D, D * sizeof *Kc);
        for (uint32_t d = 0; d < D; d++)
            Kt[d * C + i] = Kc[i * D + d];
    }
    hot->mm(n, C, D, Q, D, Kt, C, QK, C, 0);
    hot->mm(n, C, D, Kc, D, Kt, C, KK, C, 0);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < C; k++)
            gamma[k] = k <= i ? -G[k] : -INFINITY;
        (void)hot->exp64(gamma, -G[i]); /* exp(G_i - G_k), 0 past i */
        for (uint32_t k = 0; k < C; k++) {
            QK[i * C + k] = k <= i ? QK[i * C + k] * gamma[k] : 0;
            KK[i * C + k] = k < i ? beta[i] * KK[i * C + k] * gamma[k] : 0;
        }
    }
    for (uint32_t i = 0; i < C; i++)
        decay[i] = i < n ? G[i] : -INFINITY;
    (void)hot->exp64(decay, 0);
    /* R = beta V - beta exp(G) (K S) */
    hot->mm(n, D, D, Kc, D, S, D, X, D, 0);
    for (uint32_t i = 0; i < n; i++) {
        const float *v = c + (size_t)i * ch + (2 * K + head) * D;
        for (uint32_t d = 0; d < D; d++)
            R[i * D + d] = beta[i] * (v[d] - decay[i] * X[i * D + d]);
        for (uint32_t k = 0; k < i; k++)
            hot->axpy(R + i * D, R + k * D, -KK[i * C + k], D);
    }
    /* O */
    for (uint32_t i = 0; i < n; i++)
        hot->scale(Q + i * D, decay[i], D);
    hot->mm(n, D, D, Q, D, S, D, o, ldo, 0);
    hot->mm(n, D, n, QK, C, R, D, o, ldo, 1);
    /* S */
    for (uint32_t i = 0; i < C; i++)
        gamma[i] = i < n ? -G[i] : -INFINITY;
    (void)hot->exp64(gamma, -G[n - 1]);
    for (uint32_t d = 0; d < D; d++)
        for (uint32_t i = 0; i < n; i++)
            Kt[d * C + i] *= gamma[i];
    hot->scale(S, decay[n - 1], D * D);
    hot->mm(D, D, n, Kt, C, R, D, S, D, 1);
}

/* All rows of one sequence and value head. */
static void head_task(void *arg, uint32_t task, uint32_t thread)
{
    const gdn_job *j = arg;
    de_cpu_model *m = j->m;
    const de_shape *s = &m->shape;
    const uint32_t V = s->gdn_v_heads, K = s->gdn_k_heads, head = task % V;
    const de_batch_seq *q = &j->batch->seqs[task / V];
    float *S = de_slot_state(m, q->slot, j->l->index) + (size_t)head * D * D;
    float *scratch = m->scratch + thread * m->scratch_floats;
    uint32_t mark = 0;
    for (uint32_t t = 0; t < q->n_rows;) {
        uint32_t n = C - (q->start + t) % C;
        n = n < q->n_rows - t ? n : q->n_rows - t;
        const uint32_t row = q->row + t;
        if (n > 1) {
            chunk(j, row, n, head, S, scratch);
        } else {
            const float *c = m->wide[1] + (size_t)row * s->gdn_channels;
            const uint32_t kh = head / (V / K);
            float g, beta;
            gates(j, row, head, &g, &beta);
            m->hot->gdn_step(S, c + kh * D, c + (K + kh) * D, c + (2 * K + head) * D,
                             m->hot->exp1(g), beta, m->mixed + ((size_t)row * V + head) * D);
        }
        t += n;
        if (mark < q->n_marks && q->marks[mark].end == q->start + t) {
            float *to = de_slot_state(m, q->marks[mark++].slot, j->l->index);
            memcpy(to + (size_t)head * D * D, S, sizeof *S * D * D);
        }
    }
    for (uint32_t t = 0; t < q->n_rows; t++) {
        const size_t at = ((size_t)(q->row + t) * V + head) * D;
        m->hot->rms_norm(m->mixed + at, m->mixed + at, j->l->gdn_norm, 0, D, s->rms_eps);
        m->hot->mul_silu(m->mixed + at, m->wide[2] + at, D);
    }
}

void de_layer_gdn(de_cpu_model *m, const de_layer *l, const de_batch *b)
{
    const de_shape *s = &m->shape;
    const uint32_t T = b->n_rows, H = s->hidden, V = s->gdn_v_heads;
    gdn_job j = { m, l, b };
    de_linear(m, &l->qkv, m->x, H, T, m->wide[0], s->gdn_channels);
    de_linear(m, &l->z, m->x, H, T, m->wide[2], (size_t)V * D);
    de_linear(m, &l->b, m->x, H, T, m->small[0], V);
    de_linear(m, &l->a, m->x, H, T, m->small[1], V);
    de_pool_run(m->pool, b->n_seqs, (uint64_t)T * s->gdn_channels * 32, conv_task, &j);
    de_pool_run(m->pool, b->n_seqs * V, (uint64_t)T * V * 4 * D * D, head_task, &j);
    de_linear(m, &l->out, m->mixed, (size_t)V * D, T, m->y, H);
}
