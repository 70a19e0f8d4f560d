/* bind.c -- see bind.h.
 *
 * Every lookup marks its tensor as taken; what is left over at the end is
 * vision, MTP, or a mismatch. Faults are gathered, one a line, and told in one
 * error: their number and as many of them, whole, as its text holds. */
#include "model/bind.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"

enum {
    NAME_MAX_BYTES = 512,  /* of a name we build: the longest prefix and module fit several times */
    REPORT_FAULTS = 10000, /* lines of a report; a checkpoint of another shape has 100,000 faults */
};

typedef struct binder {
    const de_weights *w;
    const de_shape *shape;
    de_binding *b;
    const char *prefix; /* of the text model, with its dot */
    uint8_t *taken;     /* [tensors] */
    uint32_t n_faults;
    int code;       /* of the error: EUNSUPPORTED if one of the faults says so, else EFORMAT */
    de_text report; /* the faults, each with a newline */
    uint32_t n_int8;
    uint32_t n_whole, n_rows; /* of n_int8: with one scale in all, one scale a row */
    uint32_t group;           /* columns of a scale where a row has several; 0: none yet */
    uint32_t rows_in;         /* columns where a row has one scale; 0: none yet */
    bool groups_differ, rows_differ;
} binder;

static const char *const prefixes[] = { "model.language_model.", "language_model.model.",
                                        "model." };

__attribute__((format(printf, 3, 4))) static void fault(binder *b, int code, const char *format,
                                                        ...)
{
    char line[2 * NAME_MAX_BYTES];
    va_list ap;
    if (b->code != DELTA_EUNSUPPORTED)
        b->code = code;
    if (b->n_faults++ >= REPORT_FAULTS)
        return;
    va_start(ap, format);
    (void)vsnprintf(line, sizeof line, format, ap);
    va_end(ap);
    de_text_puts(&b->report, line);
    de_text_puts(&b->report, "\n");
}

/* Puts two parts of a name together. What does not fit is cut, and then names no tensor. */
static void join(char to[NAME_MAX_BYTES], const char *base, const char *rest)
{
    size_t a = strlen(base), n = strlen(rest);
    if (a > NAME_MAX_BYTES - 1)
        a = NAME_MAX_BYTES - 1;
    if (n > NAME_MAX_BYTES - 1 - a)
        n = NAME_MAX_BYTES - 1 - a;
    memcpy(to, base, a);
    memcpy(to + a, rest, n);
    to[a + n] = 0;
}

static const de_tensor *find(binder *b, const char *name)
{
    const de_tensor *t = de_weights_find(b->w, name);
    if (t)
        b->taken[t - de_weights_at(b->w, 0)] = 1;
    return t;
}

static bool has(const binder *b, const char *base, const char *rest)
{
    char name[NAME_MAX_BYTES];
    join(name, base, rest);
    return de_weights_find(b->w, name) != NULL;
}

static void shape_text(char s[128], const uint64_t *dims, uint32_t rank)
{
    size_t at = 0;
    s[0] = 0;
    for (uint32_t i = 0; i < rank; i++)
        at += (size_t)snprintf(s + at, 128 - at, "%s%llu", i ? "," : "",
                               (unsigned long long)dims[i]); /* 5 * 21 bytes at most */
}

static bool check_shape(binder *b, const de_tensor *t, uint32_t rank, const uint64_t *dims)
{
    if (t->rank == rank && memcmp(t->dims, dims, rank * sizeof *dims) == 0)
        return true;
    char want[128], have[128];
    shape_text(want, dims, rank);
    shape_text(have, t->dims, t->rank);
    fault(b, DELTA_EFORMAT, "%s has shape [%s], expected [%s]", t->name, have, want);
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

static de_ref part_of(const de_ref *whole, uint64_t offset, uint64_t bytes)
{
    return (de_ref){ .shard = whole->shard,
                     .dtype = whole->dtype,
                     .offset = whole->offset + offset,
                     .bytes = bytes };
}

/* A plain float tensor. */
static de_ref plain(binder *b, const char *name, uint32_t rank, const uint64_t *dims)
{
    const de_tensor *t = find(b, name);
    if (!t) {
        fault(b, DELTA_EFORMAT, "%s is missing", name);
        return (de_ref){ 0 };
    }
    if (!is_float(t->dtype)) {
        fault(b, DELTA_EFORMAT, "%s is %s, expected BF16, F16 or F32", name,
              de_dtype_name(t->dtype));
        return (de_ref){ 0 };
    }
    if (!check_shape(b, t, rank, dims))
        return (de_ref){ 0 };
    b->b->n_parameters += t->bytes / de_dtype_bytes(t->dtype);
    return ref_of(t);
}

static de_ref vector(binder *b, const char *base, const char *name, uint64_t n)
{
    char full[NAME_MAX_BYTES];
    join(full, base, name);
    return plain(b, full, 1, &n);
}

/* ---- INT8: one matrix [out, in], or n_experts of them stacked */

typedef struct packed {
    de_ref weight, scale;           /* weight.bytes == 0: there was a fault */
    uint32_t in, row_bytes, scales; /* scales: of a row */
    bool whole;                     /* one scale for the whole matrix */
} packed;

static void note(uint32_t *value, bool *differ, uint32_t v)
{
    if (*value && *value != v)
        *differ = true;
    *value = v;
}

/* For the name of the quantization, see name_quantization(). */
static void note_scales(binder *b, const packed *p)
{
    b->n_int8++;
    if (p->whole) {
        b->n_whole++;
    } else if (p->scales == 1) {
        b->n_rows++;
        note(&b->rows_in, &b->rows_differ, p->in);
    } else {
        note(&b->group, &b->groups_differ, p->in / p->scales);
    }
}

/* weight_shape is data: {out, in}; of stacked matrices also {E, out, in}, or {out, in} E times. */
static void check_weight_shape(binder *b, const char *module, uint32_t n_stacked, uint32_t out,
                               uint32_t in)
{
    char name[NAME_MAX_BYTES];
    join(name, module, ".weight_shape");
    const de_tensor *t = find(b, name);
    if (!t)
        return; /* some exporters leave it out; the other shapes tell as much */
    int64_t v[3] = { 0 };
    const bool three = n_stacked && t->bytes == 3 * sizeof *v;
    const size_t n = three ? 3 : 2;
    if (t->dtype != DE_I64 ||
        (!three && t->bytes != 2 * sizeof *v * (n_stacked && t->rank > 1 ? n_stacked : 1))) {
        fault(b, DELTA_EFORMAT, "%s must be two I64", name);
        return;
    }
    delta_error e;
    if (de_weights_read(b->w, t->shard, t->offset, v, n * sizeof *v, &e) < 0)
        fault(b, DELTA_EFORMAT, "%s: %s", name, e.text);
    else if (v[n - 2] != out || v[n - 1] != in || (three && v[0] != n_stacked))
        fault(b, DELTA_EFORMAT, "%s says {%lld,%lld}, expected {%u,%u}", name, (long long)v[n - 2],
              (long long)v[n - 1], out, in);
}

/* n_stacked == 0: a matrix of two dimensions; else three dimensions, the first being n_stacked. */
static packed bind_packed(binder *b, const char *module, uint32_t n_stacked, uint32_t out,
                          uint32_t in)
{
    char name[NAME_MAX_BYTES];
    const packed none = { 0 };
    const uint32_t rank = n_stacked ? 3 : 2, words = in / 4 + (in % 4 != 0);
    const uint64_t dims3[3] = { n_stacked, out, words }, *dims = n_stacked ? dims3 : dims3 + 1;
    check_weight_shape(b, module, n_stacked, out, in);
    join(name, module, ".weight_scale");
    const de_tensor *s = find(b, name);
    if (!s)
        fault(b, DELTA_EFORMAT, "%s is missing", name);
    join(name, module, ".weight_packed");
    const de_tensor *t = find(b, name);
    if (!t) {
        fault(b, DELTA_EFORMAT, "%s is missing", name);
        return none;
    }
    if (t->dtype != DE_I32) {
        fault(b, DELTA_EFORMAT, "%s is %s, expected I32", t->name, de_dtype_name(t->dtype));
        return none;
    }
    if (t->rank == rank && in > 4 && memcmp(t->dims, dims, (rank - 1) * sizeof *dims) == 0 &&
        t->dims[rank - 1] == in / 8 + (in % 8 != 0)) {
        fault(b, DELTA_EUNSUPPORTED, "%s is 4-bit, only 8-bit is read", t->name);
        return none;
    }
    if (!check_shape(b, t, rank, dims) || !s)
        return none;

    /* [out, n], and of a plain matrix also [out] and one number in any shape */
    const bool whole = !n_stacked && s->bytes == de_dtype_bytes(s->dtype);
    const uint64_t n = whole || s->rank == rank - 1 ? 1 : s->rank == rank ? s->dims[rank - 1] : 0;
    const bool rows = s->rank >= rank - 1 && memcmp(s->dims, dims, (rank - 1) * sizeof *dims) == 0;
    if (!is_float(s->dtype) || (!whole && !rows) || n == 0 || n > in || in % n) {
        char have[128];
        shape_text(have, s->dims, s->rank);
        fault(b, DELTA_EFORMAT,
              "%s is %s [%s], expected BF16, F16 or F32 [%u,1], [%u,groups that divide %u] or [1]",
              s->name, de_dtype_name(s->dtype), have, out, out, in);
        return none;
    }
    packed p = { .weight = ref_of(t),
                 .scale = ref_of(s),
                 .in = in,
                 .row_bytes = words * 4,
                 .scales = (uint32_t)n,
                 .whole = whole };
    note_scales(b, &p);
    b->b->n_parameters += (uint64_t)(n_stacked ? n_stacked : 1) * out * in;
    return p;
}

/* Rows [row, row + out) of all that p holds. */
static de_linear_ref packed_rows(const packed *p, uint64_t row, uint32_t out)
{
    const uint64_t scale_bytes = p->scales * de_dtype_bytes(p->scale.dtype);
    de_linear_ref l = { .format = DE_LINEAR_INT8,
                        .out = out,
                        .in = p->in,
                        .group = p->scales ? p->in / p->scales : 0,
                        .row_bytes = p->row_bytes,
                        .scale_whole = p->whole };
    l.weight = part_of(&p->weight, row * p->row_bytes, (uint64_t)out * p->row_bytes);
    l.scale = p->whole ? p->scale : part_of(&p->scale, row * scale_bytes, out * scale_bytes);
    return l;
}

/* Rows [row, row + out) of a float tensor whose last dimension is in. */
static de_linear_ref float_rows(const de_ref *r, uint64_t row, uint32_t out, uint32_t in)
{
    const uint64_t row_bytes = in * de_dtype_bytes(r->dtype);
    return (de_linear_ref){ .format = DE_LINEAR_FLOAT,
                            .out = out,
                            .in = in,
                            .group = in,
                            .weight = part_of(r, row * row_bytes, out * row_bytes),
                            .row_bytes = (uint32_t)row_bytes };
}

/* The linear base.name ("...q_proj"), in whichever form its keys have. */
static void linear(binder *b, const char *base, const char *name, uint32_t out, uint32_t in,
                   de_linear_ref *l)
{
    char full[NAME_MAX_BYTES], module[NAME_MAX_BYTES];
    join(module, base, name);
    if (has(b, module, ".weight_packed") || has(b, module, ".weight_scale")) {
        const packed p = bind_packed(b, module, 0, out, in);
        if (p.weight.bytes)
            *l = packed_rows(&p, 0, out);
        return;
    }
    join(full, module, ".weight");
    const de_ref r = plain(b, full, 2, (const uint64_t[]){ out, in });
    *l = float_rows(&r, 0, out, in);
}

/* One of the two tensors of fused experts, [E, rows, in]. */
typedef struct fused {
    bool int8;
    packed p;
    de_ref r;
    uint32_t rows, in;
} fused;

static fused bind_fused(binder *b, const char *module, uint32_t rows, uint32_t in)
{
    const uint32_t E = b->shape->n_experts;
    fused f = { .int8 = has(b, module, ".weight_packed"), .rows = rows, .in = in };
    if (f.int8)
        f.p = bind_packed(b, module, E, rows, in);
    else
        f.r = plain(b, module, 3, (const uint64_t[]){ E, rows, in });
    return f;
}

static de_linear_ref fused_rows(const fused *f, uint64_t e, uint32_t row, uint32_t out)
{
    const uint64_t at = e * f->rows + row;
    return f->int8 ? packed_rows(&f->p, at, out) : float_rows(&f->r, at, out, f->in);
}

static void bind_experts(binder *b, const char *base, de_layer_ref *l)
{
    const de_shape *s = b->shape;
    const uint32_t I = s->moe_width, H = s->hidden;
    char both[NAME_MAX_BYTES], down[NAME_MAX_BYTES], expert[NAME_MAX_BYTES];
    join(both, base, "mlp.experts.gate_up_proj");
    join(down, base, "mlp.experts.down_proj");
    if (has(b, both, "") || has(b, both, ".weight_packed") || has(b, down, "") ||
        has(b, down, ".weight_packed")) {
        const fused in = bind_fused(b, both, 2 * I, H), out = bind_fused(b, down, H, I);
        for (uint32_t e = 0; e < s->n_experts; e++) {
            l->experts[e].gate = fused_rows(&in, e, 0, I);
            l->experts[e].up = fused_rows(&in, e, I, I);
            l->experts[e].down = fused_rows(&out, e, 0, H);
        }
        return;
    }
    for (uint32_t e = 0; e < s->n_experts && b->n_faults < REPORT_FAULTS; e++) {
        char number[48];
        (void)snprintf(number, sizeof number, "mlp.experts.%u.", e);
        join(expert, base, number);
        linear(b, expert, "gate_proj", I, H, &l->experts[e].gate);
        linear(b, expert, "up_proj", I, H, &l->experts[e].up);
        linear(b, expert, "down_proj", H, I, &l->experts[e].down);
    }
}

static void bind_layer(binder *b, uint32_t i, de_layer_ref *l)
{
    const de_shape *s = b->shape;
    const uint32_t H = s->hidden;
    char base[NAME_MAX_BYTES], sub[NAME_MAX_BYTES], number[32];
    (void)snprintf(number, sizeof number, "layers.%u.", i);
    join(base, b->prefix, number);
    l->kind = (enum de_layer_kind)s->layer_kind[i];
    l->input_norm = vector(b, base, "input_layernorm.weight", H);
    l->post_norm = vector(b, base, "post_attention_layernorm.weight", H);
    if (l->kind == DE_LAYER_ATTN) {
        join(sub, base, "self_attn.");
        linear(b, sub, "q_proj", s->q_heads * DE_ATTN_DIM * 2, H, &l->q);
        linear(b, sub, "k_proj", s->kv_heads * DE_ATTN_DIM, H, &l->k);
        linear(b, sub, "v_proj", s->kv_heads * DE_ATTN_DIM, H, &l->v);
        linear(b, sub, "o_proj", H, s->q_heads * DE_ATTN_DIM, &l->o);
        l->q_norm = vector(b, sub, "q_norm.weight", DE_ATTN_DIM);
        l->k_norm = vector(b, sub, "k_norm.weight", DE_ATTN_DIM);
    } else {
        const uint32_t V = s->gdn_v_heads;
        join(sub, base, "linear_attn.");
        linear(b, sub, "in_proj_qkv", s->gdn_channels, H, &l->qkv);
        linear(b, sub, "in_proj_z", V * DE_GDN_DIM, H, &l->z);
        linear(b, sub, "in_proj_b", V, H, &l->b);
        linear(b, sub, "in_proj_a", V, H, &l->a);
        linear(b, sub, "out_proj", H, V * DE_GDN_DIM, &l->out);
        char full[NAME_MAX_BYTES];
        join(full, sub, "conv1d.weight");
        l->conv = plain(b, full, 3, (const uint64_t[]){ s->gdn_channels, 1, DE_CONV_WIDTH });
        l->A_log = vector(b, sub, "A_log", V);
        l->dt_bias = vector(b, sub, "dt_bias", V);
        l->gdn_norm = vector(b, sub, "norm.weight", DE_GDN_DIM);
    }
    linear(b, base, "mlp.gate", s->n_experts, H, &l->router);
    bind_experts(b, base, l);
    join(sub, base, "mlp.shared_expert.");
    linear(b, sub, "gate_proj", s->shared_width, H, &l->shared.gate);
    linear(b, sub, "up_proj", s->shared_width, H, &l->shared.up);
    linear(b, sub, "down_proj", H, s->shared_width, &l->shared.down);
    linear(b, base, "mlp.shared_expert_gate", 1, H, &l->shared_gate);
}

/* ---- tensors that are not bound */

static bool begins(const char *s, const char *with)
{
    return strncmp(s, with, strlen(with)) == 0;
}

static bool is_vision(const char *name)
{
    return begins(name, "model.visual.") || begins(name, "visual.");
}

static bool is_mtp(const char *name)
{
    return begins(name, "mtp.");
}

/* Endings that tell which other form a tensor belongs to. */
static const struct {
    const char *end, *what;
} foreign[] = {
    { ".qweight", "GPTQ or AWQ" },
    { ".qzeros", "GPTQ or AWQ" },
    { ".scales", "GPTQ or AWQ" },
    { ".g_idx", "GPTQ with an order of activations" },
    { ".weight_g_idx", "groups in an order of activations" },
    { ".weight_zero_point", "asymmetric: zero points" },
    { ".weight_scale_inv", "FP8 in blocks" },
    { ".weight_scale_2", "ModelOpt" },
    { ".weight_global_scale", "NVFP4" },
    { ".input_scale", "quantized activations" },
    { ".input_global_scale", "quantized activations" },
    { ".k_scale", "calibrated scales of the KV cache" },
    { ".v_scale", "calibrated scales of the KV cache" },
};
enum { N_FOREIGN = sizeof foreign / sizeof *foreign };

/* A checkpoint in another form would give a mismatch for each of its linears: say which form it
 * is instead. One fault for each kind of tensor. */
static void refuse_foreign(binder *b)
{
    uint32_t n[N_FOREIGN] = { 0 };
    const char *first[N_FOREIGN] = { 0 };
    for (size_t i = 0; i < de_weights_count(b->w); i++) {
        const char *name = de_weights_at(b->w, i)->name, *end = strrchr(name, '.');
        if (!end || is_vision(name) || is_mtp(name))
            continue;
        for (size_t k = 0; k < N_FOREIGN; k++)
            if (strcmp(end, foreign[k].end) == 0 && n[k]++ == 0)
                first[k] = name;
    }
    for (size_t k = 0; k < N_FOREIGN; k++)
        if (n[k])
            fault(b, DELTA_EUNSUPPORTED, "%u tensor%s like %.200s (%s) cannot be read", n[k],
                  n[k] == 1 ? "" : "s", first[k], foreign[k].what);
}

static void count_rest(binder *b)
{
    for (size_t i = 0; i < de_weights_count(b->w); i++) {
        const char *name = de_weights_at(b->w, i)->name;
        if (b->taken[i])
            continue;
        if (is_vision(name))
            b->b->n_vision_tensors++;
        else if (is_mtp(name))
            b->b->n_mtp_tensors++;
        else
            fault(b, DELTA_EFORMAT, "%.300s is not part of this architecture", name);
    }
}

static void name_quantization(binder *b)
{
    char *to = b->b->quantization;
    const size_t n = sizeof b->b->quantization;
    const enum de_dtype d = b->b->embed.weight.dtype;
    if (b->n_int8 == 0)
        (void)snprintf(to, n, "%s", d == DE_F32 ? "f32" : d == DE_F16 ? "f16" : "bf16");
    else if (b->n_whole == b->n_int8)
        (void)snprintf(to, n, "int8 tensor");
    else if (b->n_rows == b->n_int8)
        (void)snprintf(to, n, "int8 channel");
    else if (b->n_whole == 0 && !b->groups_differ &&
             (b->n_rows == 0 || (!b->rows_differ && b->rows_in == b->group)))
        (void)snprintf(to, n, "int8 group %u", b->group); /* a row of one group has one scale */
    else
        (void)snprintf(to, n, "int8 mixed");
}

/* ---- the whole */

static void bind_ends(binder *b)
{
    const de_shape *s = b->shape;
    linear(b, b->prefix, "embed_tokens", s->vocab, s->hidden, &b->b->embed);
    if (b->b->embed.format != DE_LINEAR_FLOAT)
        fault(b, DELTA_EUNSUPPORTED, "%sembed_tokens is quantized, a table of floats is needed",
              b->prefix);
    b->b->norm = vector(b, b->prefix, "norm.weight", s->hidden);
    const char *at = has(b, "language_model.lm_head", ".weight") ||
                             has(b, "language_model.lm_head", ".weight_packed")
                         ? "language_model."
                         : "";
    if (s->tied_embeddings && !*at && !has(b, "lm_head", ".weight") &&
        !has(b, "lm_head", ".weight_packed"))
        b->b->head = b->b->embed;
    else
        linear(b, at, "lm_head", s->vocab, s->hidden, &b->b->head);
}

static const char *find_prefix(const binder *b)
{
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        if (has(b, prefixes[i], "embed_tokens.weight") || has(b, prefixes[i], "norm.weight"))
            return prefixes[i];
    return prefixes[0];
}

/* The number of faults and as many of them, whole, as err holds. */
static int fail_with_report(const binder *b, delta_error *err)
{
    char some[400];
    size_t n = 0;
    uint32_t told = 0;
    const char *line = b->report.p ? b->report.p : "";
    for (const char *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        const size_t len = (size_t)(end - line);
        if (n + len + 2 >= sizeof some)
            break;
        n +=
            (size_t)snprintf(some + n, sizeof some - n, "%s%.*s", told ? "; " : "", (int)len, line);
        told++;
    }
    some[n] = 0;
    if (told < b->n_faults)
        return delta_fail(err, b->code,
                          "checkpoint does not fit config.json, %u mismatches: %s; and %u more",
                          b->n_faults, some, b->n_faults - told);
    return delta_fail(err, b->code, "checkpoint does not fit config.json, %u mismatch%s: %s",
                      b->n_faults, b->n_faults == 1 ? "" : "es", some);
}

static bool make_table(binder *b)
{
    const de_shape *s = b->shape;
    b->b = calloc(1, sizeof *b->b);
    b->taken = calloc(de_weights_count(b->w) + 1, 1);
    if (!b->b || !b->taken)
        return false;
    b->b->n_layers = s->n_layers;
    b->b->layers = calloc(s->n_layers, sizeof *b->b->layers);
    for (uint32_t i = 0; b->b->layers && i < s->n_layers; i++)
        if (!(b->b->layers[i].experts = calloc(s->n_experts, sizeof(de_expert_ref))))
            return false;
    return b->b->layers != NULL;
}

int de_bind_report(const de_weights *w, const de_shape *shape, de_binding **ret_b,
                   char **ret_report, delta_error *err)
{
    binder b = { .w = w, .shape = shape };
    int r = 0;
    if (!make_table(&b)) {
        r = delta_fail(err, DELTA_ENOMEM, "table of the weights");
        goto fail;
    }
    refuse_foreign(&b);
    if (b.n_faults == 0) {
        b.prefix = find_prefix(&b);
        bind_ends(&b);
        for (uint32_t i = 0; i < shape->n_layers && b.n_faults < REPORT_FAULTS; i++)
            bind_layer(&b, i, &b.b->layers[i]);
        if (b.n_faults < REPORT_FAULTS) /* else the unread layers would count as unknown */
            count_rest(&b);
    }
    if (b.n_faults) {
        r = fail_with_report(&b, err);
        if (ret_report && b.report.p && !b.report.failed) {
            *ret_report = b.report.p;
            b.report = (de_text){ 0 };
        }
        goto fail;
    }
    name_quantization(&b);
    free(b.taken);
    *ret_b = b.b;
    return 0;
fail:
    de_text_done(&b.report);
    free(b.taken);
    de_binding_free(b.b);
    return r;
}

int de_bind(const de_weights *w, const de_shape *shape, de_binding **ret_b, delta_error *err)
{
    return de_bind_report(w, shape, ret_b, NULL, err);
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
