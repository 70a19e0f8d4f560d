/* bind.c -- see bind.h.
 *
 * Every lookup marks its tensor as taken; what is left over at the end is
 * vision, MTP, or a mismatch. Faults are gathered and told in one error. */
#include "model/bind.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"

typedef struct binder {
    const de_weights *w;
    const de_shape *shape;
    de_binding *b;
    const char *prefix; /* of the text model, with its dot */
    uint8_t *taken;     /* [tensors] */
    uint32_t n_faults;
    char faults[400];
    size_t faults_len;
    uint32_t n_int8, n_float; /* linears that may be quantized */
    uint32_t group;           /* of the INT8 linears so far; 0: none yet */
    bool mixed;
} binder;

static const char *const prefixes[] = { "model.language_model.", "language_model.model.",
                                        "model." };

__attribute__((format(printf, 2, 3))) static void fault(binder *b, const char *format, ...)
{
    b->n_faults++;
    if (b->faults_len + 3 >= sizeof b->faults)
        return;
    if (b->faults_len)
        b->faults_len +=
            (size_t)snprintf(b->faults + b->faults_len, sizeof b->faults - b->faults_len, "; ");
    va_list ap;
    va_start(ap, format);
    int n = vsnprintf(b->faults + b->faults_len, sizeof b->faults - b->faults_len, format, ap);
    va_end(ap);
    b->faults_len += n < 0 ? 0 : (size_t)n;
    if (b->faults_len >= sizeof b->faults)
        b->faults_len = sizeof b->faults - 1;
}

static const de_tensor *find(binder *b, const char *name)
{
    const de_tensor *t = de_weights_find(b->w, name);
    if (t)
        b->taken[t - de_weights_at(b->w, 0)] = 1;
    return t;
}

static void shape_text(char *s, size_t n, const uint64_t *dims, uint32_t rank)
{
    size_t at = 0;
    s[0] = 0;
    for (uint32_t i = 0; i < rank && at < n; i++)
        at += (size_t)snprintf(s + at, n - at, "%s%llu", i ? "," : "", (unsigned long long)dims[i]);
}

static bool check_shape(binder *b, const de_tensor *t, uint32_t rank, const uint64_t *dims)
{
    if (t->rank == rank && memcmp(t->dims, dims, rank * sizeof *dims) == 0)
        return true;
    char want[64], have[64];
    shape_text(want, sizeof want, dims, rank);
    shape_text(have, sizeof have, t->dims, t->rank);
    fault(b, "%s has shape [%s], expected [%s]", t->name, have, want);
    return false;
}

static bool is_float(enum de_dtype d)
{
    return d == DE_BF16 || d == DE_F16 || d == DE_F32;
}

static de_ref ref_of(const de_tensor *t)
{
    return (de_ref){ .shard = t->shard, .dtype = t->dtype, .offset = t->offset, .bytes = t->bytes };
}

/* A plain float tensor. */
static de_ref plain(binder *b, const char *name, uint32_t rank, const uint64_t *dims)
{
    const de_tensor *t = find(b, name);
    if (!t) {
        fault(b, "%s is missing", name);
        return (de_ref){ 0 };
    }
    if (!is_float(t->dtype)) {
        fault(b, "%s is %s, expected BF16, F16 or F32", name, de_dtype_name(t->dtype));
        return (de_ref){ 0 };
    }
    if (!check_shape(b, t, rank, dims))
        return (de_ref){ 0 };
    uint64_t n = t->bytes / de_dtype_bytes(t->dtype);
    b->b->n_parameters += n;
    return ref_of(t);
}

static de_ref vector(binder *b, const char *base, const char *name, uint64_t n)
{
    char full[256];
    (void)snprintf(full, sizeof full, "%s%s", base, name);
    return plain(b, full, 1, &n);
}

/* weight_shape is data: two numbers, {out, in}. */
static void check_weight_shape(binder *b, const char *name, uint32_t out, uint32_t in)
{
    const de_tensor *t = find(b, name);
    if (!t)
        return; /* some exporters leave it out; the other shapes tell as much */
    int64_t v[2] = { 0 };
    delta_error e;
    if (t->bytes != sizeof v || (t->dtype != DE_I64)) {
        fault(b, "%s must be two I64", name);
        return;
    }
    if (de_weights_read(b->w, t->shard, t->offset, v, sizeof v, &e) < 0)
        fault(b, "%s", e.text);
    else if (v[0] != out || v[1] != in)
        fault(b, "%s says {%lld,%lld}, expected {%u,%u}", name, (long long)v[0], (long long)v[1],
              out, in);
}

static void bind_int8(binder *b, const char *name, const de_tensor *packed, uint32_t out,
                      uint32_t in, de_linear_ref *l)
{
    char full[256];
    static const char *const refused[] = { "weight_zero_point", "weight_g_idx" };
    for (size_t i = 0; i < 2; i++) {
        (void)snprintf(full, sizeof full, "%s.%s", name, refused[i]);
        if (find(b, full))
            fault(b, "%s: only symmetric scales in natural order are read", full);
    }
    (void)snprintf(full, sizeof full, "%s.weight_shape", name);
    check_weight_shape(b, full, out, in);
    const uint64_t words = ((uint64_t)in + 3) / 4;
    if (packed->dtype == DE_I32 && packed->rank == 2 && packed->dims[0] == out &&
        packed->dims[1] == ((uint64_t)in + 7) / 8 && words != packed->dims[1]) {
        fault(b, "%s is 4-bit, only 8-bit is read", packed->name);
        return;
    }
    if (packed->dtype != DE_I32) {
        fault(b, "%s is %s, expected I32", packed->name, de_dtype_name(packed->dtype));
        return;
    }
    if (!check_shape(b, packed, 2, (const uint64_t[]){ out, words }))
        return;
    (void)snprintf(full, sizeof full, "%s.weight_scale", name);
    const de_tensor *scale = find(b, full);
    if (!scale) {
        fault(b, "%s is missing", full);
        return;
    }
    const uint64_t n = scale->rank == 2 ? scale->dims[1] : scale->rank == 1 ? 1 : 0;
    const bool whole = scale->bytes == de_dtype_bytes(scale->dtype); /* one for the tensor */
    const bool rows = scale->rank >= 1 && scale->dims[0] == out;
    if (!is_float(scale->dtype) || n == 0 || (!whole && !rows) || (n > 1 && in % n)) {
        char have[64];
        shape_text(have, sizeof have, scale->dims, scale->rank);
        fault(b, "%s has shape [%s] and dtype %s, expected floats [%u,1], [%u,groups] or [1]", full,
              have, de_dtype_name(scale->dtype), out, out);
        return;
    }
    *l = (de_linear_ref){ .format = DE_LINEAR_INT8,
                          .out = out,
                          .in = in,
                          .group = (uint32_t)(in / n),
                          .weight = ref_of(packed),
                          .row_bytes = (uint32_t)words * 4,
                          .scale = ref_of(scale),
                          .scale_whole = whole };
    b->n_int8++;
    const uint32_t g = n == 1 ? 0 : l->group; /* 0: a scale a row */
    if (b->group != UINT32_MAX && b->group != g)
        b->mixed = true;
    b->group = g;
    b->b->n_parameters += (uint64_t)out * in;
}

/* The linear `name` ("...q_proj"), in whichever form its keys have. */
static void linear(binder *b, const char *base, const char *name, uint32_t out, uint32_t in,
                   de_linear_ref *l)
{
    char full[288], module[256];
    (void)snprintf(module, sizeof module, "%s%s", base, name);
    (void)snprintf(full, sizeof full, "%s.weight_packed", module);
    const de_tensor *t = find(b, full);
    if (t) {
        bind_int8(b, module, t, out, in, l);
        return;
    }
    (void)snprintf(full, sizeof full, "%s.weight", module);
    de_ref r = plain(b, full, 2, (const uint64_t[]){ out, in });
    *l = (de_linear_ref){ .format = DE_LINEAR_FLOAT,
                          .out = out,
                          .in = in,
                          .group = in,
                          .weight = r,
                          .row_bytes = (uint32_t)(in * de_dtype_bytes(r.dtype)) };
    b->n_float++;
}

/* Expert e of a fused tensor: rows [row, row + out) of its [rows, in] matrix. */
static de_linear_ref slice(const de_ref *whole, uint64_t e, uint64_t rows, uint64_t row,
                           uint32_t out, uint32_t in)
{
    const uint64_t row_bytes = in * de_dtype_bytes(whole->dtype);
    return (de_linear_ref){ .format = DE_LINEAR_FLOAT,
                            .out = out,
                            .in = in,
                            .group = in,
                            .weight = { .shard = whole->shard,
                                        .dtype = whole->dtype,
                                        .offset = whole->offset + (e * rows + row) * row_bytes,
                                        .bytes = out * row_bytes },
                            .row_bytes = (uint32_t)row_bytes };
}

static void bind_experts(binder *b, const char *base, de_layer_ref *l)
{
    const de_shape *s = b->shape;
    const uint32_t E = s->n_experts, I = s->moe_width, H = s->hidden;
    char full[256], expert[256];
    (void)snprintf(full, sizeof full, "%smlp.experts.gate_up_proj", base);
    if (de_weights_find(b->w, full)) {
        de_ref up = plain(b, full, 3, (const uint64_t[]){ E, 2ull * I, H });
        (void)snprintf(full, sizeof full, "%smlp.experts.down_proj", base);
        de_ref down = plain(b, full, 3, (const uint64_t[]){ E, H, I });
        for (uint32_t e = 0; e < E; e++) {
            l->experts[e].gate = slice(&up, e, 2ull * I, 0, I, H);
            l->experts[e].up = slice(&up, e, 2ull * I, I, I, H);
            l->experts[e].down = slice(&down, e, H, 0, H, I);
        }
        b->n_float++;
        return;
    }
    for (uint32_t e = 0; e < E; e++) {
        (void)snprintf(expert, sizeof expert, "%smlp.experts.%u.", base, e);
        linear(b, expert, "gate_proj", I, H, &l->experts[e].gate);
        linear(b, expert, "up_proj", I, H, &l->experts[e].up);
        linear(b, expert, "down_proj", H, I, &l->experts[e].down);
    }
}

static void bind_layer(binder *b, uint32_t i, de_layer_ref *l)
{
    const de_shape *s = b->shape;
    const uint32_t H = s->hidden;
    char base[128], sub[160];
    (void)snprintf(base, sizeof base, "%slayers.%u.", b->prefix, i);
    l->kind = (enum de_layer_kind)s->layer_kind[i];
    l->input_norm = vector(b, base, "input_layernorm.weight", H);
    l->post_norm = vector(b, base, "post_attention_layernorm.weight", H);
    if (l->kind == DE_LAYER_ATTN) {
        (void)snprintf(sub, sizeof sub, "%sself_attn.", base);
        linear(b, sub, "q_proj", s->q_heads * DE_ATTN_DIM * 2, H, &l->q);
        linear(b, sub, "k_proj", s->kv_heads * DE_ATTN_DIM, H, &l->k);
        linear(b, sub, "v_proj", s->kv_heads * DE_ATTN_DIM, H, &l->v);
        linear(b, sub, "o_proj", H, s->q_heads * DE_ATTN_DIM, &l->o);
        l->q_norm = vector(b, sub, "q_norm.weight", DE_ATTN_DIM);
        l->k_norm = vector(b, sub, "k_norm.weight", DE_ATTN_DIM);
    } else {
        const uint32_t V = s->gdn_v_heads;
        (void)snprintf(sub, sizeof sub, "%slinear_attn.", base);
        linear(b, sub, "in_proj_qkv", s->gdn_channels, H, &l->qkv);
        linear(b, sub, "in_proj_z", V * DE_GDN_DIM, H, &l->z);
        linear(b, sub, "in_proj_b", V, H, &l->b);
        linear(b, sub, "in_proj_a", V, H, &l->a);
        linear(b, sub, "out_proj", H, V * DE_GDN_DIM, &l->out);
        char full[192];
        (void)snprintf(full, sizeof full, "%sconv1d.weight", sub);
        l->conv = plain(b, full, 3, (const uint64_t[]){ s->gdn_channels, 1, DE_CONV_WIDTH });
        l->A_log = vector(b, sub, "A_log", V);
        l->dt_bias = vector(b, sub, "dt_bias", V);
        l->gdn_norm = vector(b, sub, "norm.weight", DE_GDN_DIM);
    }
    linear(b, base, "mlp.gate", s->n_experts, H, &l->router);
    bind_experts(b, base, l);
    (void)snprintf(sub, sizeof sub, "%smlp.shared_expert.", base);
    linear(b, sub, "gate_proj", s->shared_width, H, &l->shared.gate);
    linear(b, sub, "up_proj", s->shared_width, H, &l->shared.up);
    linear(b, sub, "down_proj", H, s->shared_width, &l->shared.down);
    linear(b, base, "mlp.shared_expert_gate", 1, H, &l->shared_gate);
}

static bool begins(const char *s, const char *with)
{
    return strncmp(s, with, strlen(with)) == 0;
}

static void count_rest(binder *b)
{
    for (size_t i = 0; i < de_weights_count(b->w); i++) {
        const char *name = de_weights_at(b->w, i)->name;
        const char *end = strrchr(name, '.');
        if (b->taken[i])
            continue;
        if (begins(name, "model.visual.") || begins(name, "visual."))
            b->b->n_vision_tensors++;
        else if (begins(name, "mtp."))
            b->b->n_mtp_tensors++;
        else if (end && (strcmp(end, ".k_scale") == 0 || strcmp(end, ".v_scale") == 0))
            fault(b, "%s: calibrated KV scales are not supported", name);
        else
            fault(b, "%s is not part of this architecture", name);
    }
}

static void name_quantization(binder *b)
{
    char *to = b->b->quantization;
    const size_t n = sizeof b->b->quantization;
    if (b->n_int8 == 0)
        (void)snprintf(to, n, "%s",
                       b->b->embed.weight.dtype == DE_F32   ? "f32"
                       : b->b->embed.weight.dtype == DE_F16 ? "f16"
                                                            : "bf16");
    else if (b->mixed)
        (void)snprintf(to, n, "int8 mixed");
    else if (b->group)
        (void)snprintf(to, n, "int8 group %u", b->group);
    else
        (void)snprintf(to, n, "int8 channel");
}

int de_bind(const de_weights *w, const de_shape *shape, de_binding **ret_b, delta_error *err)
{
    binder b = { .w = w, .shape = shape, .group = UINT32_MAX };
    b.b = calloc(1, sizeof *b.b);
    b.taken = calloc(de_weights_count(w) + 1, 1);
    if (!b.b || !b.taken)
        goto no_memory;
    b.b->n_layers = shape->n_layers;
    b.b->layers = calloc(shape->n_layers, sizeof *b.b->layers);
    if (!b.b->layers)
        goto no_memory;
    for (uint32_t i = 0; i < shape->n_layers; i++) {
        b.b->layers[i].experts = calloc(shape->n_experts, sizeof(de_expert_ref));
        if (!b.b->layers[i].experts)
            goto no_memory;
    }
    b.prefix = prefixes[0];
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        char name[128];
        (void)snprintf(name, sizeof name, "%sembed_tokens.weight", prefixes[i]);
        if (de_weights_find(w, name)) {
            b.prefix = prefixes[i];
            break;
        }
    }
    linear(&b, b.prefix, "embed_tokens", shape->vocab, shape->hidden, &b.b->embed);
    b.b->norm = vector(&b, b.prefix, "norm.weight", shape->hidden);
    const char *head = de_weights_find(w, "language_model.lm_head.weight") ? "language_model." : "";
    if (shape->tied_embeddings && !de_weights_find(w, "lm_head.weight"))
        b.b->head = b.b->embed;
    else
        linear(&b, head, "lm_head", shape->vocab, shape->hidden, &b.b->head);
    for (uint32_t i = 0; i < shape->n_layers; i++)
        bind_layer(&b, i, &b.b->layers[i]);
    count_rest(&b);
    free(b.taken);
    if (b.n_faults) {
        de_binding_free(b.b);
        return delta_fail(err, DELTA_EFORMAT,
                          "checkpoint does not fit config.json, %u mismatch%s: %s", b.n_faults,
                          b.n_faults == 1 ? "" : "es", b.faults);
    }
    name_quantization(&b);
    *ret_b = b.b;
    return 0;
no_memory:
    free(b.taken);
    de_binding_free(b.b);
    return delta_fail(err, DELTA_ENOMEM, "table of the weights");
}

void de_binding_free(de_binding *b)
{
    if (!b)
        return;
    for (uint32_t i = 0; b->layers && i < b->n_layers; i++)
        free(b->layers[i].experts);
    free(b->layers);
    free(b);
}
