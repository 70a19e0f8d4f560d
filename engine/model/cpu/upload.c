/* upload.c -- weights from the checkpoint into the panels of the CPU backend.
 *
 * Tensors are read whole into one staging buffer, then repacked in their
 * stored format: BF16 and INT8 stay as they are in memory, F16 becomes F32.
 * A value that is not finite, or a scale of 0 over weights that are not 0, is
 * a damaged checkpoint, found here by name and not in an answer. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/bf16.h"
#include "base/bits.h"
#include "model/cpu/model.h"

typedef struct uploader {
    de_cpu_model *m;
    const de_weights *w;
    uint8_t *staging;
    size_t staging_size;
    uint64_t done, total; /* bytes */
    delta_error *err;
} uploader;

static float element(const uint8_t *p, enum de_dtype dtype, size_t i)
{
    uint16_t h;
    float f;
    if (dtype == DE_F32) {
        memcpy(&f, p + i * 4, 4);
        return f;
    }
    memcpy(&h, p + i * 2, 2);
    return dtype == DE_BF16 ? de_bf16_to_float(h) : de_f16_to_float(h);
}

/* The tensor that a reference lies in. */
static const de_tensor *tensor_of(const uploader *u, const de_ref *ref)
{
    for (size_t i = 0; i < de_weights_count(u->w); i++) {
        const de_tensor *t = de_weights_at(u->w, i);
        if (t->shard == ref->shard && t->offset <= ref->offset &&
            ref->offset + ref->bytes <= t->offset + t->bytes)
            return t;
    }
    return NULL;
}

static int bad_value(const uploader *u, const de_ref *ref, uint64_t i, const char *what)
{
    const de_tensor *t = tensor_of(u, ref);
    if (t)
        i += (ref->offset - t->offset) / de_dtype_bytes(ref->dtype);
    return delta_fail(u->err, DELTA_EFORMAT, "%s: value %llu is %s", t ? t->name : "a tensor",
                      (unsigned long long)i, what);
}

/* Whether bits of the exponent are all set in any of n values at p: infinities and NaNs. */
static bool any_set16(const uint8_t *p, size_t n, uint16_t bits)
{
    unsigned found = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, p + i * 2, 2);
        found |= (h & bits) == bits;
    }
    return found;
}

static bool any_set32(const uint8_t *p, size_t n, uint32_t bits)
{
    unsigned found = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t h;
        memcpy(&h, p + i * 4, 4);
        found |= (h & bits) == bits;
    }
    return found;
}

static int check_finite(const uploader *u, const de_ref *ref)
{
    const size_t n = ref->bytes / de_dtype_bytes(ref->dtype);
    const bool bad = ref->dtype == DE_F32    ? any_set32(u->staging, n, 0x7F800000)
                     : ref->dtype == DE_BF16 ? any_set16(u->staging, n, 0x7F80)
                     : ref->dtype == DE_F16  ? any_set16(u->staging, n, 0x7C00)
                                             : false;
    for (size_t i = 0; bad && i < n; i++) {
        const float f = element(u->staging, ref->dtype, i);
        if (!isfinite(f))
            return bad_value(u, ref, i, isnan(f) ? "not a number" : "infinite");
    }
    return 0;
}

static int stage(uploader *u, const de_ref *ref)
{
    if (ref->bytes > u->staging_size) {
        uint8_t *p = realloc(u->staging, ref->bytes);
        if (!p)
            return delta_fail(u->err, DELTA_ENOMEM, "staging buffer of %llu bytes",
                              (unsigned long long)ref->bytes);
        u->staging = p;
        u->staging_size = ref->bytes;
    }
    int r = de_weights_read(u->w, ref->shard, ref->offset, u->staging, ref->bytes, u->err);
    if (r < 0)
        return r;
    u->done += ref->bytes;
    if (u->m->options.on_progress)
        u->m->options.on_progress(u->m->options.arg, "weights", u->done, u->total);
    return check_finite(u, ref);
}

/* A tensor as floats, malloc'ed. */
static int floats(uploader *u, const de_ref *ref, float **ret)
{
    int r = stage(u, ref);
    if (r < 0)
        return r;
    const size_t n = ref->bytes / de_dtype_bytes(ref->dtype);
    float *p = aligned_alloc(64, de_align_up(n * sizeof *p, 64));
    if (!p)
        return delta_fail(u->err, DELTA_ENOMEM, "%zu weights", n);
    for (size_t i = 0; i < n; i++)
        p[i] = element(u->staging, ref->dtype, i);
    *ret = p;
    return 0;
}

static size_t format_bytes(enum de_panel_format f)
{
    return f == DE_PANEL_F32 ? 4 : f == DE_PANEL_BF16 ? 2 : 1;
}

static enum de_panel_format panel_format(const de_linear_ref *l)
{
    return l->format == DE_LINEAR_INT8  ? DE_PANEL_INT8
           : l->weight.dtype == DE_BF16 ? DE_PANEL_BF16
                                        : DE_PANEL_F32;
}

static uint64_t panels_bytes(const de_linear_ref *l)
{
    const uint64_t out = de_align_up(l->out, DE_PANEL);
    uint64_t n = de_align_up(out * l->in * format_bytes(panel_format(l)), 64);
    if (l->format == DE_LINEAR_INT8)
        n += de_align_up(out * (l->in / l->group) * sizeof(float), 64);
    return n;
}

static void pack_rows(const uploader *u, const de_linear_ref *l, de_panels *p)
{
    for (uint32_t o = 0; o < l->out; o++) {
        const uint8_t *row = u->staging + (size_t)o * l->row_bytes;
        const size_t at = (size_t)(o / DE_PANEL) * l->in * DE_PANEL + o % DE_PANEL;
        if (p->format == DE_PANEL_INT8) {
            int8_t *to = (int8_t *)p->data + at;
            for (uint32_t k = 0; k < l->in; k++)
                to[(size_t)k * DE_PANEL] = (int8_t)(row[k] ^ 0x80);
        } else if (p->format == DE_PANEL_BF16) {
            uint16_t *to = (uint16_t *)p->data + at;
            for (uint32_t k = 0; k < l->in; k++)
                memcpy(&to[(size_t)k * DE_PANEL], row + (size_t)k * 2, 2);
        } else {
            float *to = (float *)p->data + at;
            for (uint32_t k = 0; k < l->in; k++)
                to[(size_t)k * DE_PANEL] = element(row, l->weight.dtype, k);
        }
    }
}

/* Whether group g of row o holds zeros only. */
static bool all_zero(const de_panels *p, uint32_t o, uint32_t g)
{
    const int8_t *q = (const int8_t *)p->data + (size_t)(o / DE_PANEL) * p->in * DE_PANEL;
    for (uint32_t k = g * p->group; k < (g + 1) * p->group; k++)
        if (q[(size_t)k * DE_PANEL + o % DE_PANEL])
            return false;
    return true;
}

static int linear(uploader *u, const de_linear_ref *l, de_panels *p)
{
    int r = stage(u, &l->weight);
    if (r < 0)
        return r;
    const size_t out = de_align_up(l->out, DE_PANEL), groups = l->in / l->group;
    *p = (de_panels){ .format = panel_format(l), .out = l->out, .in = l->in, .group = l->group };
    const size_t bytes = de_align_up(out * l->in * format_bytes(p->format), 64);
    p->data = aligned_alloc(64, bytes);
    if (!p->data)
        return delta_fail(u->err, DELTA_ENOMEM, "weights [%u, %u]", l->out, l->in);
    memset(p->data, 0, bytes);
    pack_rows(u, l, p);
    if (l->format != DE_LINEAR_INT8)
        return 0;
    const size_t scale_bytes = de_align_up(out * groups * sizeof(float), 64);
    p->scale = aligned_alloc(64, scale_bytes);
    if (!p->scale)
        return delta_fail(u->err, DELTA_ENOMEM, "scales [%u, %zu]", l->out, groups);
    memset(p->scale, 0, scale_bytes);
    r = stage(u, &l->scale);
    for (uint32_t o = 0; r == 0 && o < l->out; o++)
        for (size_t g = 0; r == 0 && g < groups; g++) {
            const size_t i = l->scale_whole ? 0 : o * groups + g;
            const float scale = element(u->staging, l->scale.dtype, i);
            if (scale == 0 && !all_zero(p, o, (uint32_t)g))
                r = bad_value(u, &l->scale, i, "a scale of 0, its weights are not 0");
            p->scale[((o / DE_PANEL) * groups + g) * DE_PANEL + o % DE_PANEL] = scale;
        }
    return r;
}

static int expert(uploader *u, const de_expert_ref *from, de_expert *to)
{
    int r = linear(u, &from->gate, &to->gate);
    if (r == 0)
        r = linear(u, &from->up, &to->up);
    return r == 0 ? linear(u, &from->down, &to->down) : r;
}

static int attention(uploader *u, const de_layer_ref *from, de_layer *to)
{
    int r = linear(u, &from->q, &to->q);
    if (r == 0)
        r = linear(u, &from->k, &to->k);
    if (r == 0)
        r = linear(u, &from->v, &to->v);
    if (r == 0)
        r = linear(u, &from->o, &to->o);
    if (r == 0)
        r = floats(u, &from->q_norm, &to->q_norm);
    return r == 0 ? floats(u, &from->k_norm, &to->k_norm) : r;
}

static int deltanet(uploader *u, const de_layer_ref *from, de_layer *to)
{
    const uint32_t C = u->m->shape.gdn_channels;
    float *conv = NULL;
    int r = linear(u, &from->qkv, &to->qkv);
    if (r == 0)
        r = linear(u, &from->z, &to->z);
    if (r == 0)
        r = linear(u, &from->b, &to->b);
    if (r == 0)
        r = linear(u, &from->a, &to->a);
    if (r == 0)
        r = linear(u, &from->out, &to->out);
    if (r == 0)
        r = floats(u, &from->gdn_norm, &to->gdn_norm);
    if (r == 0)
        r = floats(u, &from->dt_bias, &to->dt_bias);
    if (r == 0)
        r = floats(u, &from->A_log, &to->neg_exp_A);
    for (uint32_t i = 0; r == 0 && i < u->m->shape.gdn_v_heads; i++)
        if (!isfinite(to->neg_exp_A[i] = (float)-exp((double)to->neg_exp_A[i])))
            r = bad_value(u, &from->A_log, i, "too large");
    if (r == 0)
        r = floats(u, &from->conv, &conv);
    if (r == 0 && !(to->conv = aligned_alloc(64, (size_t)C * DE_CONV_WIDTH * sizeof *to->conv)))
        r = delta_fail(u->err, DELTA_ENOMEM, "conv weights");
    for (uint32_t c = 0; r == 0 && c < C; c++)
        for (uint32_t j = 0; j < DE_CONV_WIDTH; j++)
            to->conv[j * C + c] = conv[c * DE_CONV_WIDTH + j];
    free(conv);
    return r;
}

static int layer(uploader *u, const de_layer_ref *from, de_layer *to)
{
    const uint32_t E = u->m->shape.n_experts;
    int r = floats(u, &from->input_norm, &to->input_norm);
    if (r == 0)
        r = floats(u, &from->post_norm, &to->post_norm);
    if (r == 0)
        r = to->kind == DE_LAYER_ATTN ? attention(u, from, to) : deltanet(u, from, to);
    if (r == 0)
        r = linear(u, &from->router, &to->router);
    if (r == 0)
        r = linear(u, &from->shared_gate, &to->shared_gate);
    if (r == 0 && !(to->experts = calloc(E + 1, sizeof *to->experts)))
        r = delta_fail(u->err, DELTA_ENOMEM, "table of experts");
    for (uint32_t e = 0; r == 0 && e < E; e++)
        r = expert(u, &from->experts[e], &to->experts[e]);
    return r == 0 ? expert(u, &from->shared, &to->experts[E]) : r;
}

static uint64_t expert_bytes(const de_expert_ref *e)
{
    return panels_bytes(&e->gate) + panels_bytes(&e->up) + panels_bytes(&e->down);
}

uint64_t de_upload_bytes(const de_shape *s, const de_binding *b)
{
    uint64_t n = panels_bytes(&b->embed) + panels_bytes(&b->head);
    for (uint32_t i = 0; i < b->n_layers; i++) {
        const de_layer_ref *l = &b->layers[i];
        n += panels_bytes(&l->router) + panels_bytes(&l->shared_gate) + expert_bytes(&l->shared);
        for (uint32_t e = 0; e < s->n_experts; e++)
            n += expert_bytes(&l->experts[e]);
        if (l->kind == DE_LAYER_ATTN)
            n += panels_bytes(&l->q) + panels_bytes(&l->k) + panels_bytes(&l->v) +
                 panels_bytes(&l->o);
        else
            n += panels_bytes(&l->qkv) + panels_bytes(&l->z) + panels_bytes(&l->b) +
                 panels_bytes(&l->a) + panels_bytes(&l->out) +
                 (uint64_t)s->gdn_channels * DE_CONV_WIDTH * sizeof(float);
    }
    return n;
}

int de_upload(de_cpu_model *m, const de_weights *w, const de_binding *b, delta_error *err)
{
    uploader u = { .m = m, .w = w, .err = err };
    for (size_t i = 0; i < de_weights_count(w); i++) {
        const char *name = de_weights_at(w, i)->name;
        if (!strstr(name, "visual.") && strncmp(name, "mtp.", 4) != 0)
            u.total += de_weights_at(w, i)->bytes;
    }
    int r = linear(&u, &b->embed, &m->embed);
    if (r == 0)
        r = linear(&u, &b->head, &m->head);
    if (r == 0)
        r = floats(&u, &b->norm, &m->norm);
    for (uint32_t i = 0; r == 0 && i < b->n_layers; i++) {
        m->layers[i].kind = b->layers[i].kind;
        m->layers[i].index = m->shape.kind_index[i];
        r = layer(&u, &b->layers[i], &m->layers[i]);
    }
    free(u.staging);
    return r;
}

static void panels_free(de_panels *p)
{
    free(p->data);
    free(p->scale);
}

void de_upload_free(de_cpu_model *m)
{
    panels_free(&m->embed);
    panels_free(&m->head);
    free(m->norm);
    for (uint32_t i = 0; m->layers && i < m->shape.n_layers; i++) {
        de_layer *l = &m->layers[i];
        de_panels *const all[] = { &l->q, &l->k, &l->v,   &l->o,      &l->qkv,        &l->z,
                                   &l->b, &l->a, &l->out, &l->router, &l->shared_gate };
        for (size_t k = 0; k < sizeof all / sizeof *all; k++)
            panels_free(all[k]);
        float *const rows[] = { l->input_norm, l->post_norm, l->q_norm,  l->k_norm,
                                l->conv,       l->neg_exp_A, l->dt_bias, l->gdn_norm };
        for (size_t k = 0; k < sizeof rows / sizeof *rows; k++)
            free(rows[k]);
        for (uint32_t e = 0; l->experts && e <= m->shape.n_experts; e++) {
            panels_free(&l->experts[e].gate);
            panels_free(&l->experts[e].up);
            panels_free(&l->experts[e].down);
        }
        free(l->experts);
    }
    free(m->layers);
}

void de_embed_row(const de_cpu_model *m, uint32_t id, float *out)
{
    const de_panels *p = &m->embed;
    const size_t at = (size_t)(id / DE_PANEL) * p->in * DE_PANEL + id % DE_PANEL;
    for (uint32_t k = 0; k < p->in; k++) {
        const size_t i = at + (size_t)k * DE_PANEL;
        if (p->format == DE_PANEL_BF16)
            out[k] = de_bf16_to_float(((const uint16_t *)p->data)[i]);
        else if (p->format == DE_PANEL_F32)
            out[k] = ((const float *)p->data)[i];
        else
            out[k] = (float)((const int8_t *)p->data)[i] *
                     p->scale[((id / DE_PANEL) * (p->in / p->group) + k / p->group) * DE_PANEL +
                              id % DE_PANEL];
    }
}
