/* forward.c -- the CPU backend: open a model, and one forward over a batch: READ THIS for the order
 * of the layers.
 *
 *   h = embed[tokens];  per layer: h += mixer(norm(h)); h += moe(norm(h));
 *   logits = head * norm(h), for the rows that want them
 *
 * (spec: RMSNorm with 1 + w, no embedding scale, no soft cap.) */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bits.h"
#include "model/cpu/model.h"
#include "model/rope.h"

/* ---- sizes */

static uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* The widest row of wide[]: a projection's output. */
static size_t widest(const de_shape *s)
{
    uint32_t n = max_u32(s->q_heads * DE_ATTN_DIM * 2, s->gdn_channels);
    return max_u32(n, s->gdn_v_heads * DE_GDN_DIM);
}

enum { ATTN_ROWS = 8 }; /* rows of one attention task */

/* Floats of a thread's scratch: the largest need of any task. */
static size_t scratch_floats(const de_shape *s, uint32_t T)
{
    const size_t D = DE_GDN_DIM, C = DE_CHUNK;
    /* layer_gdn.c: Q K V R of a chunk, K transposed, two score matrices, rows of gates */
    const size_t gdn = 4 * C * D + D * C + 2 * C * C + 8 * C;
    const size_t attn = (size_t)ATTN_ROWS * (DE_ATTN_DIM + DE_PAGE + DE_ATTN_DIM) + 64;
    const size_t width = max_u32(s->moe_width, s->shared_width);
    const size_t moe = (size_t)T * (2 * s->hidden + 2 * width) + 64;
    size_t n = gdn > attn ? gdn : attn;
    n = n > moe ? n : moe;
    return (n + 15) / 16 * 16;
}

typedef struct workspace_plan {
    size_t offset[24], total; /* bytes */
    int n;
} workspace_plan;

static size_t take(workspace_plan *p, size_t bytes)
{
    p->offset[p->n] = p->total;
    p->total += de_align_up(bytes, 64);
    return p->offset[p->n++];
}

/* Lays the workspace out; with memory, sets the model's pointers. Returns its bytes. */
static size_t layout(de_cpu_model *m, const de_shape *s, const de_model_options *o,
                     uint32_t threads, char *memory)
{
    workspace_plan p = { .n = 0 };
    const size_t T = o->max_rows, F = sizeof(float), H = s->hidden,
                 E16 = de_align_up(s->n_experts, 16);
    const size_t mixed = max_u32(s->q_heads * DE_ATTN_DIM, s->gdn_v_heads * DE_GDN_DIM);
#define PLACE(member, bytes)                                                                       \
    do {                                                                                           \
        size_t at = take(&p, bytes);                                                               \
        if (memory)                                                                                \
            m->member = (void *)(memory + at);                                                     \
    } while (0)
    PLACE(h, T * H * F);
    PLACE(x, T * H * F);
    PLACE(y, T * H * F);
    PLACE(wide[0], T * widest(s) * F);
    PLACE(wide[1], T * widest(s) * F);
    PLACE(wide[2], T * widest(s) * F);
    PLACE(small[0], T * de_align_up(s->gdn_v_heads, 16) * F);
    PLACE(small[1], T * de_align_up(s->gdn_v_heads, 16) * F);
    PLACE(mixed, T * mixed * F);
    PLACE(rope, T * s->rotary_dims * F);
    PLACE(router, T * E16 * F);
    PLACE(top_id, T * s->top_k * sizeof(uint32_t));
    PLACE(top_w, T * s->top_k * F);
    PLACE(expert_first, (s->n_experts + 1) * sizeof(uint32_t));
    PLACE(expert_slot, T * s->top_k * sizeof(uint32_t));
    PLACE(expert_out, T * (s->top_k + 1) * H * F);
    PLACE(shared_gate, T * 16 * F);
    PLACE(scratch, threads * scratch_floats(s, (uint32_t)T) * F);
#undef PLACE
    return p.total;
}

static int check_shape(const de_shape *s, delta_error *err)
{
    const struct {
        const char *name;
        uint32_t n;
    } widths[] = { { "hidden_size", s->hidden },
                   { "moe_intermediate_size", s->moe_width },
                   { "shared_expert_intermediate_size", s->shared_width } };
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        if (widths[i].n % DE_PANEL)
            return delta_fail(err, DELTA_EUNSUPPORTED, "%s %u is no multiple of %d", widths[i].name,
                              widths[i].n, DE_PANEL);
    return 0;
}

static size_t page_floats(const de_shape *s)
{
    return (size_t)2 * s->kv_heads * DE_ATTN_DIM * DE_PAGE;
}

static size_t slot_layer_floats(const de_shape *s)
{
    return (size_t)s->gdn_v_heads * DE_GDN_DIM * DE_GDN_DIM +
           (size_t)(DE_CONV_WIDTH - 1) * s->gdn_channels;
}

static int plan(const de_shape *s, const de_binding *b, const de_model_options *o,
                de_memory_plan *ret_plan, delta_error *err)
{
    int r = check_shape(s, err);
    if (r == 0 && o->kv_type != DE_KV_AUTO)
        r = delta_fail(err, DELTA_EUNSUPPORTED,
                       "backend cpu keeps keys and values as F32 alone: kv_type auto");
    if (r < 0)
        return r;
    *ret_plan = (de_memory_plan){
        .weights_bytes = de_upload_bytes(s, b),
        .kv_bytes = (uint64_t)s->n_attn * o->n_pages * page_floats(s) * sizeof(float),
        .state_bytes = (uint64_t)o->n_slots * s->n_gdn * slot_layer_floats(s) * sizeof(float),
        .workspace_bytes = layout(NULL, s, o, de_pool_count(o->threads), NULL),
    };
    return 0;
}

/* ---- open */

static float *zeroed(size_t n_floats)
{
    /* calloc: untouched pages of a large pool cost nothing until used */
    return calloc(n_floats ? n_floats : 1, sizeof(float));
}

static void close_model(de_model *base)
{
    de_cpu_model *m = (de_cpu_model *)base;
    de_pool_free(m->pool);
    de_upload_free(m);
    free(m->inv_freq);
    free(m->kv);
    free(m->state);
    free(m->memory);
    free(m);
}

static int open_model(const de_weights *w, const de_shape *shape, const de_binding *b,
                      const de_model_options *o, de_model **ret_m, delta_error *err)
{
    int r = check_shape(shape, err);
    if (r < 0)
        return r;
    if (!w)
        return delta_fail(err, DELTA_EUNSUPPORTED, "synthetic weights are for backend cuda");
    de_cpu_model *m = calloc(1, sizeof *m);
    if (!m)
        return delta_fail(err, DELTA_ENOMEM, "model");
    m->shape = *shape;
    m->options = *o;
    m->hot = de_hot_best();
    m->pool = de_pool_new(o->threads);
    m->layers = calloc(shape->n_layers, sizeof *m->layers);
    m->inv_freq = calloc(shape->rotary_dims / 2, sizeof *m->inv_freq);
    if (!m->pool || !m->layers || !m->inv_freq) {
        r = delta_fail(err, DELTA_ENOMEM, "model: threads or tables");
        goto fail;
    }
    de_rope_frequencies(shape, m->inv_freq);
    r = de_upload(m, w, b, err);
    if (r < 0)
        goto fail;
    m->page_floats = page_floats(shape);
    m->slot_layer_floats = slot_layer_floats(shape);
    m->slot_floats = m->slot_layer_floats * shape->n_gdn;
    m->kv = zeroed((size_t)shape->n_attn * o->n_pages * m->page_floats);
    m->state = zeroed((size_t)o->n_slots * m->slot_floats);
    const uint32_t threads = de_pool_threads(m->pool);
    m->scratch_floats = scratch_floats(shape, o->max_rows);
    const size_t bytes = layout(m, shape, o, threads, NULL);
    m->memory = aligned_alloc(64, bytes);
    if (!m->kv || !m->state || !m->memory) {
        r = delta_fail(err, DELTA_ENOMEM, "model: KV pages, state or %zu bytes of workspace",
                       bytes);
        goto fail;
    }
    memset(m->memory, 0, bytes);
    (void)layout(m, shape, o, threads, m->memory);
    *ret_m = &m->base;
    return 0;
fail:
    close_model(&m->base);
    return r;
}

/* ---- linear on all threads */

typedef struct linear_job {
    const de_hot *hot;
    const de_panels *w;
    const float *x;
    float *y;
    size_t ldx, ldy;
    uint32_t rows, panels, per_task;
} linear_job;

static void linear_task(void *arg, uint32_t task, uint32_t thread)
{
    (void)thread;
    const linear_job *j = arg;
    const uint32_t p0 = task * j->per_task, p1 = p0 + j->per_task;
    j->hot->linear(j->w, j->x, j->ldx, j->rows, j->y, j->ldy, p0, p1 < j->panels ? p1 : j->panels);
}

void de_linear(de_cpu_model *m, const de_panels *w, const float *x, size_t ldx, uint32_t rows,
               float *y, size_t ldy)
{
    linear_job j = { m->hot, w, x, y, ldx, ldy, rows, (w->out + DE_PANEL - 1) / DE_PANEL, 8 };
    if (rows == 0)
        return;
    de_pool_run(m->pool, (j.panels + j.per_task - 1) / j.per_task, (uint64_t)rows * w->in * w->out,
                linear_task, &j);
}

/* ---- forward */

typedef struct row_job {
    de_cpu_model *m;
    const float *x, *w;
    float *y;
    uint32_t n_rows;
} row_job;

enum { ROWS_PER_TASK = 16 };

static void norm_task(void *arg, uint32_t task, uint32_t thread)
{
    (void)thread;
    const row_job *j = arg;
    const uint32_t H = j->m->shape.hidden, end = (task + 1) * ROWS_PER_TASK;
    for (uint32_t r = task * ROWS_PER_TASK; r < end && r < j->n_rows; r++)
        j->m->hot->rms_norm(j->y + (size_t)r * H, j->x + (size_t)r * H, j->w, 1, H,
                            j->m->shape.rms_eps);
}

static void norm_rows(de_cpu_model *m, float *y, const float *x, const float *w, uint32_t n_rows)
{
    row_job j = { m, x, w, y, n_rows };
    de_pool_run(m->pool, (n_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK,
                (uint64_t)n_rows * m->shape.hidden * 4, norm_task, &j);
}

static void add_rows(de_cpu_model *m, uint32_t n_rows)
{
    const size_t n = (size_t)n_rows * m->shape.hidden;
    for (size_t i = 0; i < n; i++)
        m->h[i] += m->y[i];
}

/* cos and sin of every row. The angle is computed as the reference does: f32 position times f32
 * frequency, rounded to f32; interleaved axes. */
static void fill_rope(de_cpu_model *m, const de_batch *b)
{
    const de_shape *s = &m->shape;
    const uint32_t half = s->rotary_dims / 2;
    const double factor = s->yarn ? s->yarn_attention_factor : 1;
    for (uint32_t r = 0; r < b->n_rows; r++)
        for (uint32_t i = 0; i < half; i++) {
            const float angle = (float)b->pos[r][de_rope_axis(s, i)] * m->inv_freq[i];
            m->rope[(size_t)r * s->rotary_dims + i] = (float)(cos((double)angle) * factor);
            m->rope[(size_t)r * s->rotary_dims + half + i] = (float)(sin((double)angle) * factor);
        }
}

static void copy_rows(float *to, const float *from, uint32_t n_rows, uint32_t width)
{
    if (to)
        memcpy(to, from, (size_t)n_rows * width * sizeof *to);
}

static int forward(de_model *base, const de_batch *b, float *logits, const de_capture *capture,
                   delta_error *err)
{
    (void)err;
    de_cpu_model *m = (de_cpu_model *)base;
    const uint32_t T = b->n_rows, H = m->shape.hidden;
    for (uint32_t i = 0; i < T; i++)
        de_embed_row(m, b->tokens[i], m->h + (size_t)i * H);
    copy_rows(capture ? capture->embed : NULL, m->h, T, H);
    fill_rope(m, b);
    for (uint32_t i = 0; i < m->shape.n_layers; i++) {
        const de_layer *l = &m->layers[i];
        norm_rows(m, m->x, m->h, l->input_norm, T);
        if (l->kind == DE_LAYER_ATTN)
            de_layer_attn(m, l, b);
        else
            de_layer_gdn(m, l, b);
        add_rows(m, T);
        norm_rows(m, m->x, m->h, l->post_norm, T);
        de_layer_moe(m, l, T);
        add_rows(m, T);
        copy_rows(capture && capture->layers ? capture->layers[i] : NULL, m->h, T, H);
    }
    if (capture && capture->norm)
        norm_rows(m, capture->norm, m->h, m->norm, T);
    /* the rows with logits, gathered */
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const de_batch_seq *q = &b->seqs[i];
        memmove(m->y + (size_t)q->first_out * H, m->h + ((size_t)q->row + q->n_rows - q->n_out) * H,
                (size_t)q->n_out * H * sizeof(float));
    }
    norm_rows(m, m->x, m->y, m->norm, b->n_out);
    de_linear(m, &m->head, m->x, H, b->n_out, logits, m->shape.vocab);
    return 0;
}

/* ---- slots */

static void slot_clear(de_model *base, uint32_t slot)
{
    de_cpu_model *m = (de_cpu_model *)base;
    memset(m->state + slot * m->slot_floats, 0, m->slot_floats * sizeof(float));
}

static size_t slot_bytes(const de_model *base)
{
    return ((const de_cpu_model *)base)->slot_floats * sizeof(float);
}

static int slot_save(de_model *base, uint32_t slot, void *dst, delta_error *err)
{
    (void)err;
    const de_cpu_model *m = (de_cpu_model *)base;
    memcpy(dst, m->state + slot * m->slot_floats, slot_bytes(base));
    return 0;
}

static int slot_load(de_model *base, uint32_t slot, const void *src, delta_error *err)
{
    (void)err;
    de_cpu_model *m = (de_cpu_model *)base;
    memcpy(m->state + slot * m->slot_floats, src, slot_bytes(base));
    return 0;
}

static int slot_copy(de_model *base, uint32_t from, uint32_t to, delta_error *err)
{
    return slot_load(
        base, to, ((de_cpu_model *)base)->state + from * ((de_cpu_model *)base)->slot_floats, err);
}

/* ---- pages */

static size_t page_layer_bytes(const de_cpu_model *m)
{
    return m->page_floats * sizeof(float);
}

static size_t page_bytes(const de_model *base)
{
    const de_cpu_model *m = (const de_cpu_model *)base;
    return m->shape.n_attn * page_layer_bytes(m);
}

static int page_save(de_model *base, uint32_t page, void *dst, delta_error *err)
{
    (void)err;
    const de_cpu_model *m = (de_cpu_model *)base;
    for (uint32_t i = 0; i < m->shape.n_attn; i++)
        memcpy((float *)dst + i * m->page_floats, de_page(m, i, page), page_layer_bytes(m));
    return 0;
}

static int page_load(de_model *base, uint32_t page, const void *src, delta_error *err)
{
    (void)err;
    const de_cpu_model *m = (de_cpu_model *)base;
    for (uint32_t i = 0; i < m->shape.n_attn; i++)
        memcpy(de_page(m, i, page), (const float *)src + i * m->page_floats, page_layer_bytes(m));
    return 0;
}

static int page_copy(de_model *base, uint32_t from, uint32_t to, delta_error *err)
{
    (void)err;
    const de_cpu_model *m = (de_cpu_model *)base;
    for (uint32_t i = 0; i < m->shape.n_attn; i++)
        memcpy(de_page(m, i, to), de_page(m, i, from), page_layer_bytes(m));
    return 0;
}

static uint64_t memory_bytes(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : UINT64_MAX;
}

static void *host_alloc(size_t bytes)
{
    return calloc(1, bytes);
}

const de_backend de_backend_cpu = {
    .name = "cpu",
    .rows = 512,
    .host_alloc = host_alloc,
    .host_free = free,
    .memory_bytes = memory_bytes,
    .plan = plan,
    .open = open_model,
    .free = close_model,
    .forward = forward,
    .slot_clear = slot_clear,
    .slot_bytes = slot_bytes,
    .slot_save = slot_save,
    .slot_load = slot_load,
    .slot_copy = slot_copy,
    .page_bytes = page_bytes,
    .page_save = page_save,
    .page_load = page_load,
    .page_copy = page_copy,
};
