/* layer_attn.c -- one gated attention mixer: m->x [T, hidden] -> m->y [T, hidden].
 *
 *   q, gate = x Wq (per head: 256 query, 256 gate);  k = x Wk;  v = x Wv
 *   q, k = rope(norm(q), norm(k));  k, v go to their page
 *   o = softmax(q K' / 16) V, causal, over the pages in order;  y = (o * sigmoid(gate)) Wo
 *
 * The softmax runs page by page with a running maximum. For a given row the
 * order of every sum depends on nothing but its position. */
#include <math.h>
#include <string.h>

#include "model/cpu/model.h"

enum { D = DE_ATTN_DIM, ROWS = 8 };

typedef struct attn_job {
    de_cpu_model *m;
    const de_layer *l;
    const de_batch *batch;
    uint32_t blocks; /* of ROWS rows, over all sequences */
} attn_job;

static void rotate(float *x, const float *rope, uint32_t dims)
{
    const uint32_t half = dims / 2;
    for (uint32_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half], c = rope[i], s = rope[half + i];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
    }
}

/* Norm, rotary and cache of one row: its k and v heads. */
static void keys_task(void *arg, uint32_t task, uint32_t thread)
{
    (void)thread;
    const attn_job *j = arg;
    de_cpu_model *m = j->m;
    const de_shape *s = &m->shape;
    const de_batch_seq *q = &j->batch->seqs[task];
    for (uint32_t t = 0; t < q->n_rows; t++) {
        const uint32_t row = q->row + t, at = q->start + t;
        float *page = de_page(m, j->l->index, q->pages[at / DE_PAGE]);
        for (uint32_t h = 0; h < s->kv_heads; h++) {
            float *k = m->wide[1] + ((size_t)row * s->kv_heads + h) * D;
            const float *v = m->wide[2] + ((size_t)row * s->kv_heads + h) * D;
            m->hot->rms_norm(k, k, j->l->k_norm, 1, D, s->rms_eps);
            rotate(k, m->rope + (size_t)row * s->rotary_dims, s->rotary_dims);
            float *kt = page + (size_t)h * D * DE_PAGE + at % DE_PAGE;
            for (uint32_t d = 0; d < D; d++)
                kt[(size_t)d * DE_PAGE] = k[d];
            memcpy(page + ((size_t)(s->kv_heads + h) * DE_PAGE + at % DE_PAGE) * D, v,
                   D * sizeof *v);
        }
    }
}

/* Up to ROWS rows of one sequence, one query head. */
static void rows_of_head(const attn_job *j, const de_batch_seq *seq, uint32_t t0, uint32_t n,
                         uint32_t head, float *scratch)
{
    de_cpu_model *m = j->m;
    const de_hot *hot = m->hot;
    const de_shape *s = &m->shape;
    const uint32_t kvh = head / (s->q_heads / s->kv_heads);
    const size_t ldq = (size_t)s->q_heads * 2 * D, ldo = (size_t)s->q_heads * D;
    float *q = scratch, *score = q + ROWS * D;
    float max[ROWS], sum[ROWS];
    for (uint32_t r = 0; r < n; r++) {
        const uint32_t row = seq->row + t0 + r;
        float *to = q + r * D;
        hot->rms_norm(to, m->wide[0] + row * ldq + (size_t)head * 2 * D, j->l->q_norm, 1, D,
                      s->rms_eps);
        rotate(to, m->rope + (size_t)row * s->rotary_dims, s->rotary_dims);
        hot->scale(to, 0.0625f, D);
        max[r] = -INFINITY;
        sum[r] = 0;
        memset(m->mixed + row * ldo + (size_t)head * D, 0, D * sizeof(float));
    }
    float *o = m->mixed + ((size_t)seq->row + t0) * ldo + (size_t)head * D;
    const uint32_t first = seq->start + t0, end = first + n; /* positions of the rows */
    for (uint32_t p = 0; p * DE_PAGE < end; p++) {
        const float *page = de_page(m, j->l->index, seq->pages[p]);
        const uint32_t valid = end - p * DE_PAGE < DE_PAGE ? end - p * DE_PAGE : DE_PAGE;
        hot->mm(n, DE_PAGE, D, q, D, page + (size_t)kvh * D * DE_PAGE, DE_PAGE, score, DE_PAGE, 0);
        for (uint32_t r = 0; r < n; r++) {
            float *sc = score + r * DE_PAGE, top = max[r];
            const uint32_t seen = first + r + 1; /* tokens this row may see */
            for (uint32_t t = 0; t < DE_PAGE; t++) {
                if (p * DE_PAGE + t >= seen)
                    sc[t] = -INFINITY; /* also what stands in the page past its end */
                else if (sc[t] > top)
                    top = sc[t];
            }
            const float fade = hot->exp1(max[r] - top);
            sum[r] = fmaf(sum[r], fade, hot->exp64(sc, top));
            if (fade != 1)
                hot->scale(o + r * ldo, fade, D);
            max[r] = top;
        }
        hot->mm(n, D, valid, score, DE_PAGE, page + (size_t)(s->kv_heads + kvh) * DE_PAGE * D, D, o,
                ldo, 1);
    }
    for (uint32_t r = 0; r < n; r++) {
        const uint32_t row = seq->row + t0 + r;
        hot->scale(o + r * ldo, 1 / sum[r], D);
        hot->mul_sigmoid(o + r * ldo, m->wide[0] + row * ldq + ((size_t)head * 2 + 1) * D, D);
    }
}

static void attn_task(void *arg, uint32_t task, uint32_t thread)
{
    const attn_job *j = arg;
    de_cpu_model *m = j->m;
    const uint32_t head = task / j->blocks;
    uint32_t block = task % j->blocks;
    const de_batch_seq *seq = j->batch->seqs;
    for (; block >= (seq->n_rows + ROWS - 1) / ROWS; seq++)
        block -= (seq->n_rows + ROWS - 1) / ROWS;
    const uint32_t t0 = block * ROWS, left = seq->n_rows - t0;
    rows_of_head(j, seq, t0, left < ROWS ? left : ROWS, head,
                 m->scratch + thread * m->scratch_floats);
}

void de_layer_attn(de_cpu_model *m, const de_layer *l, const de_batch *b)
{
    const de_shape *s = &m->shape;
    const uint32_t T = b->n_rows, H = s->hidden;
    attn_job j = { m, l, b, 0 };
    uint64_t pairs = 0; /* row, key */
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const de_batch_seq *q = &b->seqs[i];
        j.blocks += (q->n_rows + ROWS - 1) / ROWS;
        pairs += (uint64_t)q->n_rows * (q->start + q->n_rows);
    }
    de_linear(m, &l->q, m->x, H, T, m->wide[0], (size_t)s->q_heads * 2 * D);
    de_linear(m, &l->k, m->x, H, T, m->wide[1], (size_t)s->kv_heads * D);
    de_linear(m, &l->v, m->x, H, T, m->wide[2], (size_t)s->kv_heads * D);
    de_pool_run(m->pool, b->n_seqs, (uint64_t)T * s->kv_heads * D * 16, keys_task, &j);
    de_pool_run(m->pool, j.blocks * s->q_heads, pairs * s->q_heads * 2 * D, attn_task, &j);
    de_linear(m, &l->o, m->mixed, (size_t)s->q_heads * D, T, m->y, H);
}
