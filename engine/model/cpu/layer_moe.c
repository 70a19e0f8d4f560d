/* layer_moe.c -- the experts: m->x [T, hidden] -> m->y [T, hidden].
 *
 *   p = softmax(x Wr); the top_k largest (lowest index on a tie), renormalised
 *   y = sum_e p_e down_e(silu(gate_e x) * up_e x) + sigmoid(x . wg) shared(x)
 *
 * Rows are grouped by expert, so that weights are read once a batch; a row's
 * sum goes over its experts in rising index, whatever else is in the batch. */
#include <math.h>
#include <string.h>

#include "model/cpu/model.h"

typedef struct moe_job {
    de_cpu_model *m;
    const de_layer *l;
    uint32_t n_rows;
} moe_job;

/* Softmax over the chosen equals softmax over all, renormalised. */
static void route_row(de_cpu_model *m, uint32_t row)
{
    const uint32_t E = m->shape.n_experts, k = m->shape.top_k;
    const float *logit = m->router + (size_t)row * E;
    uint32_t *id = m->top_id + (size_t)row * k;
    float *w = m->top_w + (size_t)row * k;
    for (uint32_t j = 0; j < k; j++) { /* insertion by falling logit */
        id[j] = UINT32_MAX;
    }
    for (uint32_t e = 0; e < E; e++) {
        uint32_t at = k;
        while (at > 0 && (id[at - 1] == UINT32_MAX || logit[e] > logit[id[at - 1]]))
            at--;
        if (at == k)
            continue;
        memmove(id + at + 1, id + at, (k - 1 - at) * sizeof *id);
        id[at] = e;
    }
    if (id[k - 1] == UINT32_MAX) /* NaN logits: any experts do, the row is lost */
        for (uint32_t j = 0; j < k; j++)
            id[j] = j;
    double sum = 0, max = logit[id[0]];
    for (uint32_t j = 0; j < k; j++)
        sum += exp(logit[id[j]] - max);
    for (uint32_t j = 1; j < k; j++) /* rising index */
        for (uint32_t i = j; i > 0 && id[i] < id[i - 1]; i--) {
            uint32_t t = id[i];
            id[i] = id[i - 1];
            id[i - 1] = t;
        }
    for (uint32_t j = 0; j < k; j++)
        w[j] = (float)(exp(logit[id[j]] - max) / sum);
}

/* Which (row, choice) pairs each expert has. */
static void group(de_cpu_model *m, uint32_t n_rows)
{
    const uint32_t E = m->shape.n_experts, k = m->shape.top_k, n = n_rows * k;
    memset(m->expert_first, 0, (E + 1) * sizeof *m->expert_first);
    for (uint32_t i = 0; i < n; i++)
        m->expert_first[m->top_id[i] + 1]++;
    for (uint32_t e = 0; e < E; e++)
        m->expert_first[e + 1] += m->expert_first[e];
    for (uint32_t i = 0; i < n; i++)
        m->expert_slot[m->expert_first[m->top_id[i]]++] = i;
    for (uint32_t e = E; e > 0; e--) /* filling moved each start to its end */
        m->expert_first[e] = m->expert_first[e - 1];
    m->expert_first[0] = 0;
}

static void expert_task(void *arg, uint32_t task, uint32_t thread)
{
    const moe_job *j = arg;
    de_cpu_model *m = j->m;
    const de_shape *s = &m->shape;
    const uint32_t H = s->hidden, k = s->top_k, E = s->n_experts;
    const uint32_t e = task == 0 ? E : task - 1; /* the shared one has the most rows: first */
    const de_expert *w = &j->l->experts[e];
    const uint32_t first = e < E ? m->expert_first[e] : 0;
    const uint32_t n = e < E ? m->expert_first[e + 1] - first : j->n_rows;
    if (n == 0)
        return;
    float *x = m->scratch + thread * m->scratch_floats, *y = x + (size_t)n * H;
    float *up = y + (size_t)n * H, *act = up + (size_t)n * w->up.out;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t row = e < E ? m->expert_slot[first + i] / k : i;
        memcpy(x + (size_t)i * H, m->x + (size_t)row * H, H * sizeof *x);
    }
    const uint32_t panels = (w->gate.out + DE_PANEL - 1) / DE_PANEL;
    m->hot->linear(&w->gate, x, H, n, act, w->gate.out, 0, panels);
    m->hot->linear(&w->up, x, H, n, up, w->up.out, 0, panels);
    for (uint32_t i = 0; i < n; i++)
        m->hot->silu_mul(act + (size_t)i * w->gate.out, up + (size_t)i * w->up.out, w->gate.out);
    m->hot->linear(&w->down, act, w->down.in, n, y, H, 0, (H + DE_PANEL - 1) / DE_PANEL);
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t slot = e < E ? m->expert_slot[first + i] : 0;
        const size_t to = e < E ? (size_t)(slot / k) * (k + 1) + slot % k : (size_t)i * (k + 1) + k;
        memcpy(m->expert_out + to * H, y + (size_t)i * H, H * sizeof *y);
    }
}

void de_layer_moe(de_cpu_model *m, const de_layer *l, uint32_t n_rows)
{
    const de_shape *s = &m->shape;
    const uint32_t H = s->hidden, k = s->top_k;
    moe_job j = { m, l, n_rows };
    de_linear(m, &l->router, m->x, H, n_rows, m->router, s->n_experts);
    de_linear(m, &l->shared_gate, m->x, H, n_rows, m->shared_gate, 1);
    for (uint32_t r = 0; r < n_rows; r++)
        route_row(m, r);
    group(m, n_rows);
    const uint64_t work = (uint64_t)n_rows * 3 * H * (k * s->moe_width + s->shared_width);
    de_pool_run(m->pool, s->n_experts + 1, work, expert_task, &j);
    for (uint32_t r = 0; r < n_rows; r++) {
        const float *from = m->expert_out + (size_t)r * (k + 1) * H;
        float *y = m->y + (size_t)r * H;
        memset(y, 0, H * sizeof *y);
        for (uint32_t c = 0; c < k; c++)
            m->hot->axpy(y, from + (size_t)c * H, m->top_w[(size_t)r * k + c], H);
        const float gate = (float)(1 / (1 + exp(-(double)m->shared_gate[r])));
        m->hot->axpy(y, from + (size_t)k * H, gate, H);
    }
}
