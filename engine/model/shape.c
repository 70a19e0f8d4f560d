/* shape.c -- config.json to de_shape. Faults are gathered, so that one error names them all. */
#include "model/shape.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"

enum { CTX_LIMIT = 1 << 24 }; /* positions up to there are exact in f32 */

typedef struct reader {
    char faults[400];
    size_t n;
    int code; /* EUNSUPPORTED if one fault says so, else EFORMAT; 0: none */
} reader;

__attribute__((format(printf, 3, 4))) static void fault(reader *r, int code, const char *format,
                                                        ...)
{
    if (r->code != DELTA_EUNSUPPORTED) /* the answer to "can it be mended?" */
        r->code = code;
    if (r->n + 3 >= sizeof r->faults)
        return;
    if (r->n) {
        r->faults[r->n++] = ';';
        r->faults[r->n++] = ' ';
    }
    va_list ap;
    va_start(ap, format);
    int k = vsnprintf(r->faults + r->n, sizeof r->faults - r->n, format, ap);
    va_end(ap);
    if (k > 0)
        r->n = r->n + (size_t)k < sizeof r->faults ? r->n + (size_t)k : sizeof r->faults - 1;
}

/* A required whole number in 1 .. max. */
static uint32_t need(reader *r, const de_json *v, const char *key, uint32_t max)
{
    uint64_t u;
    if (!de_json_u64(de_json_get(v, key), &u) || u < 1 || u > max) {
        fault(r, DELTA_EFORMAT, "%s must be a number in 1..%u", key, max);
        return 1;
    }
    return (uint32_t)u;
}

static uint32_t optional(reader *r, const de_json *v, const char *key, uint32_t max, uint32_t dflt)
{
    const de_json *m = de_json_get(v, key);
    uint64_t u;
    if (!m || m->kind == DE_JSON_NULL)
        return dflt;
    if (!de_json_u64(m, &u) || u > max) {
        fault(r, DELTA_EFORMAT, "%s must be a number in 0..%u", key, max);
        return dflt;
    }
    return (uint32_t)u;
}

static const de_json *given(const de_json *v, const char *key)
{
    const de_json *m = de_json_get(v, key);
    return m && m->kind != DE_JSON_NULL ? m : NULL;
}

static double number(reader *r, const de_json *v, const char *key, double dflt)
{
    const de_json *m = given(v, key);
    double d = dflt;
    if (m && !de_json_double(m, &d))
        fault(r, DELTA_EFORMAT, "%s must be a number", key);
    return d;
}

static bool truth(reader *r, const de_json *v, const char *key, bool dflt)
{
    const de_json *m = given(v, key);
    bool b = dflt;
    if (m && !de_json_bool(m, &b))
        fault(r, DELTA_EFORMAT, "%s must be true or false", key);
    return b;
}

/* A dimension that the kernels fix. */
static void fixed(reader *r, const de_json *v, const char *key, uint32_t want)
{
    uint64_t u;
    if (!de_json_u64(de_json_get(v, key), &u))
        fault(r, DELTA_EFORMAT, "%s must be a number", key);
    else if (u != want)
        fault(r, DELTA_EUNSUPPORTED, "%s is %llu, only %u is served", key, (unsigned long long)u,
              want);
}

static void read_layers(reader *r, const de_json *text, de_shape *s)
{
    const de_json *types = given(text, "layer_types");
    const uint32_t every = optional(r, text, "full_attention_interval", UINT32_MAX, 4);
    if (!types && every == 0)
        fault(r, DELTA_EFORMAT, "full_attention_interval must be at least 1");
    if (types && (types->kind != DE_JSON_ARRAY || types->n != s->n_layers)) {
        fault(r, DELTA_EFORMAT, "layer_types must list %u layers", s->n_layers);
        return;
    }
    const de_json *t = types ? types->child : NULL;
    for (uint32_t i = 0; i < s->n_layers; i++, t = t ? t->next : NULL) {
        bool attn = types ? de_json_is_string(t, "full_attention") : every && (i + 1) % every == 0;
        if (types && !attn && !de_json_is_string(t, "linear_attention"))
            fault(r, DELTA_EUNSUPPORTED,
                  "layer_types[%u] is neither full_attention nor "
                  "linear_attention",
                  i);
        s->layer_kind[i] = attn ? DE_LAYER_ATTN : DE_LAYER_GDN;
        s->kind_index[i] = attn ? s->n_attn++ : s->n_gdn++;
    }
}

/* Frequencies go to the axes in turn: T, H, W, T, ... The text's positions are equal on all three. */
static void read_sections(reader *r, const de_json *rope, de_shape *s)
{
    const de_json *list = given(rope, "mrope_section");
    const uint32_t n_freq = s->rotary_dims / 2;
    uint64_t sum = 0, u;
    uint32_t n = 0;
    if (!list) { /* as even as it goes: 11, 11, 10 for 32 */
        for (uint32_t i = 0; i < 3; i++)
            s->mrope_section[i] = (n_freq + 2 - i) / 3;
        return;
    }
    for (const de_json *e = list->child; e; e = e->next, n++) {
        if (n == 3 || !de_json_u64(e, &u) || u > DE_ATTN_DIM) {
            sum = UINT64_MAX;
            break;
        }
        s->mrope_section[n] = (uint32_t)u;
        sum += u;
    }
    if (list->kind != DE_JSON_ARRAY || n != 3 || sum != n_freq)
        fault(r, DELTA_EFORMAT, "mrope_section must be three numbers that sum to %u", n_freq);
    if (!truth(r, rope, "mrope_interleaved", true))
        fault(r, DELTA_EUNSUPPORTED, "mrope_interleaved must be true");
}

static const char *rope_type(const de_json *rope)
{
    const de_json *t = given(rope, "rope_type");
    if (!t)
        t = given(rope, "type"); /* the older name */
    return !t                                                     ? "default"
           : t->kind == DE_JSON_STRING && strlen(t->text) == t->n ? t->text
                                                                  : "no text";
}

/* How cos and sin are stretched when the exporter does not say so itself. */
static double yarn_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

static void read_yarn(reader *r, const de_json *rope, de_shape *s)
{
    s->yarn = true;
    if (!given(rope, "factor"))
        fault(r, DELTA_EFORMAT, "yarn: factor is missing");
    s->yarn_factor = number(r, rope, "factor", 1);
    s->yarn_beta_fast = number(r, rope, "beta_fast", 32);
    s->yarn_beta_slow = number(r, rope, "beta_slow", 1);
    s->yarn_original_ctx =
        optional(r, rope, "original_max_position_embeddings", CTX_LIMIT, s->ctx_max);
    if (!(s->yarn_factor >= 1 && s->yarn_factor <= 1024) || !(s->yarn_beta_slow > 0) ||
        !(s->yarn_beta_fast > s->yarn_beta_slow) || s->yarn_original_ctx == 0) {
        fault(r, DELTA_EFORMAT,
              "yarn: factor, beta_fast, beta_slow or "
              "original_max_position_embeddings out of range");
        return;
    }
    if (!truth(r, rope, "truncate", true))
        fault(r, DELTA_EUNSUPPORTED, "yarn: truncate must be true");
    const double one = number(r, rope, "mscale", 0), all = number(r, rope, "mscale_all_dim", 0);
    const double dflt = one > 0 && all > 0
                            ? yarn_mscale(s->yarn_factor, one) / yarn_mscale(s->yarn_factor, all)
                            : yarn_mscale(s->yarn_factor, 1);
    s->yarn_attention_factor = number(r, rope, "attention_factor", dflt);
    if (!(s->yarn_attention_factor > 0 && s->yarn_attention_factor < 1e4))
        fault(r, DELTA_EFORMAT, "yarn: attention_factor out of range");
    const double reach = s->yarn_factor * s->yarn_original_ctx;
    if (reach > s->ctx_max)
        s->ctx_max = reach < CTX_LIMIT ? (uint32_t)reach : CTX_LIMIT;
}

/* rope_parameters, or the older rope_theta + rope_scaling. */
static void read_rope(reader *r, const de_json *text, de_shape *s)
{
    const de_json *rope = given(text, "rope_parameters"), *old = given(text, "rope_scaling");
    if (rope && old && strcmp(rope_type(rope), rope_type(old)) != 0)
        fault(r, DELTA_EFORMAT, "rope_parameters and rope_scaling contradict each other");
    if (!rope)
        rope = old;
    if (rope && rope->kind != DE_JSON_OBJECT)
        fault(r, DELTA_EFORMAT, "rope_parameters must be an object");
    if (!given(rope, "rope_theta") && !given(text, "rope_theta"))
        fault(r, DELTA_EFORMAT, "rope_theta is missing");
    s->rope_theta = number(r, given(rope, "rope_theta") ? rope : text, "rope_theta", 10000000);
    const double part = number(r, given(rope, "partial_rotary_factor") ? rope : text,
                               "partial_rotary_factor", 0.25);
    if (!(s->rope_theta > 1))
        fault(r, DELTA_EFORMAT, "rope_theta must be more than 1");
    if (part > 0 && part <= 1)
        s->rotary_dims = (uint32_t)(part * DE_ATTN_DIM);
    if (s->rotary_dims < 2 || s->rotary_dims % 2) {
        fault(r, DELTA_EFORMAT, "partial_rotary_factor %g gives no even number of dimensions",
              part);
        return;
    }
    read_sections(r, rope, s);
    const char *type = rope_type(rope);
    if (strcmp(type, "yarn") == 0)
        read_yarn(r, rope, s);
    else if (strcmp(type, "default") != 0 && strcmp(type, "mrope") != 0)
        fault(r, DELTA_EUNSUPPORTED, "rope_type is %.40s, default and yarn are served", type);
}

static void read_vision(reader *r, const de_json *root, de_shape *s)
{
    const de_json *v = de_json_get(root, "vision_config");
    s->has_vision = v && v->kind == DE_JSON_OBJECT;
    if (!s->has_vision)
        return;
    s->vision = (de_vision_shape){
        .depth = need(r, v, "depth", 1024),
        .hidden = need(r, v, "hidden_size", 65536),
        .heads = need(r, v, "num_heads", 1024),
        .intermediate = need(r, v, "intermediate_size", 1 << 20),
        .patch = need(r, v, "patch_size", 256),
        .temporal_patch = need(r, v, "temporal_patch_size", 16),
        .merge = need(r, v, "spatial_merge_size", 16),
        .positions = need(r, v, "num_position_embeddings", 1 << 20),
        .out_hidden = need(r, v, "out_hidden_size", 65536),
    };
    if (s->vision.hidden % s->vision.heads)
        fault(r, DELTA_EFORMAT, "vision_config: hidden_size is no multiple of num_heads");
}

static void read_text(reader *r, const de_json *text, de_shape *s)
{
    s->n_layers = need(r, text, "num_hidden_layers", DE_MAX_LAYERS);
    s->hidden = need(r, text, "hidden_size", 65536);
    s->vocab = need(r, text, "vocab_size", 1 << 22);
    s->ctx_max = need(r, text, "max_position_embeddings", CTX_LIMIT);
    s->rms_eps = (float)number(r, text, "rms_norm_eps", 1e-6);
    if (!(s->rms_eps > 0 && s->rms_eps < 1))
        fault(r, DELTA_EFORMAT, "rms_norm_eps is out of range");
    read_layers(r, text, s);
    s->q_heads = need(r, text, "num_attention_heads", 1024);
    s->kv_heads = need(r, text, "num_key_value_heads", 1024);
    if (s->q_heads % s->kv_heads)
        fault(r, DELTA_EFORMAT, "num_attention_heads is no multiple of num_key_value_heads");
    fixed(r, text, "head_dim", DE_ATTN_DIM);
    fixed(r, text, "linear_key_head_dim", DE_GDN_DIM);
    fixed(r, text, "linear_value_head_dim", DE_GDN_DIM);
    fixed(r, text, "linear_conv_kernel_dim", DE_CONV_WIDTH);
    if (!truth(r, text, "attn_output_gate", true))
        fault(r, DELTA_EUNSUPPORTED, "attn_output_gate must be true");
    if (truth(r, text, "attention_bias", false))
        fault(r, DELTA_EUNSUPPORTED, "attention_bias must be false");
    const de_json *act = given(text, "hidden_act");
    if (act && !de_json_is_string(act, "silu"))
        fault(r, DELTA_EUNSUPPORTED, "hidden_act must be silu");
    read_rope(r, text, s);
    s->gdn_k_heads = need(r, text, "linear_num_key_heads", 1024);
    s->gdn_v_heads = need(r, text, "linear_num_value_heads", 1024);
    if (s->gdn_v_heads % s->gdn_k_heads)
        fault(r, DELTA_EFORMAT, "linear_num_value_heads is no multiple of linear_num_key_heads");
    s->gdn_channels = (2 * s->gdn_k_heads + s->gdn_v_heads) * DE_GDN_DIM;
    s->n_experts = need(r, text, "num_experts", DE_MAX_EXPERTS);
    s->top_k = need(r, text, "num_experts_per_tok", 64);
    if (s->top_k > s->n_experts)
        fault(r, DELTA_EFORMAT, "num_experts_per_tok is more than num_experts");
    s->moe_width = need(r, text, "moe_intermediate_size", 65536);
    s->shared_width = need(r, text, "shared_expert_intermediate_size", 65536);
    const de_json *dense = de_json_get(text, "mlp_only_layers");
    if (dense && dense->kind == DE_JSON_ARRAY && dense->n)
        fault(r, DELTA_EUNSUPPORTED, "mlp_only_layers must be empty");
    s->mtp_layers = optional(r, text, "mtp_num_hidden_layers", 16, 0);
}

/* Formats whose tensors would not bind, or bind and mean something else: better said by their name.
 * What the groups say of bits, strategy and targets is not read: the tensors tell. */
static void read_quantization(reader *r, const de_json *root, const de_json *text)
{
    const de_json *q = given(root, "quantization_config");
    if (!q)
        q = given(text, "quantization_config");
    if (!q)
        return;
    const de_json *method = given(q, "quant_method"), *format = given(q, "format");
    if (q->kind != DE_JSON_OBJECT) {
        fault(r, DELTA_EFORMAT, "quantization_config must be an object");
        return;
    }
    if (!method || !de_json_is_string(method, "compressed-tensors")) {
        fault(r, DELTA_EUNSUPPORTED, "quant_method is %.60s, only compressed-tensors is read",
              method && method->kind == DE_JSON_STRING ? method->text : "not given");
        return;
    }
    const bool mixed = de_json_is_string(format, "mixed-precision");
    if (format && !mixed && !de_json_is_string(format, "pack-quantized") &&
        !de_json_is_string(format, "dense"))
        fault(r, DELTA_EUNSUPPORTED, "quantization format is %.60s, only pack-quantized is read",
              format->kind == DE_JSON_STRING ? format->text : "no text");
    const de_json *groups = given(q, "config_groups");
    for (const de_json *g = groups ? groups->child : NULL; g; g = g->next) {
        const de_json *f = given(g, "format");
        if (f && !de_json_is_string(f, "pack-quantized") && !de_json_is_string(f, "dense"))
            fault(r, DELTA_EUNSUPPORTED,
                  "quantization format of a group is %.60s, only pack-quantized is read",
                  f->kind == DE_JSON_STRING ? f->text : "no text");
        if (given(g, "input_activations"))
            fault(r, DELTA_EUNSUPPORTED,
                  "quantized activations (input_activations) are not served");
    }
    const de_json *rotate = given(given(q, "transform_config"), "config_groups");
    if (rotate && rotate->n) /* the weights are stored rotated: wrong answers, not an error */
        fault(r, DELTA_EUNSUPPORTED, "transform_config (rotated weights) is not served");
}

/* A token id below vocab_size; UINT32_MAX if there is none. */
static uint32_t token(reader *r, const de_json *root, const char *key, uint32_t vocab)
{
    return optional(r, root, key, vocab - 1, UINT32_MAX);
}

int de_shape_parse(const char *text, size_t len, de_shape *ret_shape, delta_error *err)
{
    de_arena arena;
    de_arena_init(&arena, 64u << 20);
    de_json *root;
    int code = de_json_parse(&arena, text, len, &root, err);
    if (code < 0) {
        delta_error_prefix(err, "config.json");
        de_arena_done(&arena);
        return code;
    }
    reader r = { .n = 0 };
    de_shape s = { 0 };
    const de_json *type = de_json_get(root, "model_type");
    const de_json *t = de_json_get(root, "text_config");
    if (!t && de_json_is_string(type, "qwen3_5_moe_text"))
        t = root; /* a text-only export */
    if (!de_json_is_string(type, "qwen3_5_moe") && t != root)
        fault(&r, DELTA_EUNSUPPORTED, "model_type is \"%.60s\", this daemon serves qwen3_5_moe",
              type && type->kind == DE_JSON_STRING ? type->text : "");
    else if (!t || t->kind != DE_JSON_OBJECT)
        fault(&r, DELTA_EFORMAT, "text_config is missing");
    else
        read_text(&r, t, &s);
    if (t && t->kind == DE_JSON_OBJECT) {
        s.tied_embeddings =
            truth(&r, given(root, "tie_word_embeddings") ? root : t, "tie_word_embeddings", false);
        read_quantization(&r, root, t);
    }
    if (r.code == 0) {
        read_vision(&r, root, &s);
        s.image_token = token(&r, root, "image_token_id", s.vocab);
        s.video_token = token(&r, root, "video_token_id", s.vocab);
        s.vision_start_token = token(&r, root, "vision_start_token_id", s.vocab);
        s.vision_end_token = token(&r, root, "vision_end_token_id", s.vocab);
    }
    de_arena_done(&arena);
    if (r.code)
        return delta_fail(err, r.code, "config.json: %s", r.faults);
    *ret_shape = s;
    return 0;
}

int de_shape_read(const char *dir, de_shape *ret_shape, delta_error *err)
{
    char *path = de_path_join(dir, "config.json"), *text = NULL;
    size_t len;
    int r = path ? de_file_read(path, 16 << 20, &text, &len, err)
                 : delta_fail(err, DELTA_ENOMEM, "path of config.json");
    if (r == 0)
        r = de_shape_parse(text, len, ret_shape, err);
    free(text);
    free(path);
    return r;
}
