/* shape.c -- config.json to de_shape. Faults are gathered, so that one error names them all. */
#include "model/shape.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/json.h"

typedef struct reader {
    char faults[400];
    size_t n;
    int code; /* the worst so far */
} reader;

__attribute__((format(printf, 3, 4))) static void fault(reader *r, int code, const char *format,
                                                        ...)
{
    if (r->code == 0)
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

static double number(const de_json *v, const char *key, double dflt)
{
    double d;
    return de_json_double(de_json_get(v, key), &d) ? d : dflt;
}

static void fixed(reader *r, const de_json *v, const char *key, uint32_t want)
{
    uint64_t u;
    if (!de_json_u64(de_json_get(v, key), &u) || u != want)
        fault(r, DELTA_EUNSUPPORTED, "%s must be %u", key, want);
}

static void read_layers(reader *r, const de_json *text, de_shape *s)
{
    const de_json *types = de_json_get(text, "layer_types");
    const uint32_t every = optional(r, text, "full_attention_interval", DE_MAX_LAYERS, 4);
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

/* rope_parameters, or the older rope_theta + rope_scaling. */
static void read_rope(reader *r, const de_json *text, de_shape *s)
{
    const de_json *rope = de_json_get(text, "rope_parameters");
    if (!rope || rope->kind != DE_JSON_OBJECT)
        rope = de_json_get(text, "rope_scaling");
    s->rope_theta = number(rope, "rope_theta", number(text, "rope_theta", 10000000));
    const double part =
        number(rope, "partial_rotary_factor", number(text, "partial_rotary_factor", 0.25));
    if (!(s->rope_theta > 1) || !(part > 0 && part <= 1))
        fault(r, DELTA_EFORMAT, "rope_theta or partial_rotary_factor out of range");
    else
        s->rotary_dims = (uint32_t)(part * DE_ATTN_DIM);
    if (s->rotary_dims < 2 || s->rotary_dims % 2)
        fault(r, DELTA_EFORMAT, "rotary dims %u must be even", s->rotary_dims);
    const de_json *section = de_json_get(rope, "mrope_section");
    uint32_t sum = 0, n = 0;
    for (const de_json *e = section ? section->child : NULL; e; e = e->next, n++) {
        uint64_t u = 0;
        if (n < 3 && de_json_u64(e, &u) && u <= DE_ATTN_DIM) {
            s->mrope_section[n] = (uint32_t)u;
            sum += (uint32_t)u;
        }
    }
    if (!section) {
        s->mrope_section[0] = s->rotary_dims / 2;
    } else if (n != 3 || sum != s->rotary_dims / 2) {
        fault(r, DELTA_EFORMAT, "mrope_section must be three numbers that sum to %u",
              s->rotary_dims / 2);
    }
    const de_json *type = de_json_get(rope, "rope_type");
    if (!type)
        type = de_json_get(rope, "type");
    if (!type || de_json_is_string(type, "default") || de_json_is_string(type, "mrope"))
        return;
    if (!de_json_is_string(type, "yarn")) {
        fault(r, DELTA_EUNSUPPORTED, "rope_type must be default or yarn");
        return;
    }
    s->yarn = true;
    s->yarn_factor = number(rope, "factor", 4);
    s->yarn_beta_fast = number(rope, "beta_fast", 32);
    s->yarn_beta_slow = number(rope, "beta_slow", 1);
    s->yarn_original_ctx =
        optional(r, rope, "original_max_position_embeddings", 1u << 30, s->ctx_max);
    if (!(s->yarn_factor >= 1) || !(s->yarn_beta_slow > 0) ||
        !(s->yarn_beta_fast > s->yarn_beta_slow) || s->yarn_original_ctx == 0)
        fault(r, DELTA_EFORMAT, "yarn: factor, beta_fast or beta_slow out of range");
    else
        s->yarn_attention_factor = number(rope, "attention_factor", 0.1 * log(s->yarn_factor) + 1);
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
}

static void read_text(reader *r, const de_json *text, de_shape *s)
{
    s->n_layers = need(r, text, "num_hidden_layers", DE_MAX_LAYERS);
    s->hidden = need(r, text, "hidden_size", 65536);
    s->vocab = need(r, text, "vocab_size", 1 << 22);
    s->ctx_max = need(r, text, "max_position_embeddings", 1 << 24);
    s->rms_eps = (float)number(text, "rms_norm_eps", 1e-6);
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
    bool b;
    if (de_json_bool(de_json_get(text, "attn_output_gate"), &b) && !b)
        fault(r, DELTA_EUNSUPPORTED, "attn_output_gate must be true");
    if (de_json_bool(de_json_get(text, "attention_bias"), &b) && b)
        fault(r, DELTA_EUNSUPPORTED, "attention_bias must be false");
    const de_json *act = de_json_get(text, "hidden_act");
    if (act && !de_json_is_string(act, "silu"))
        fault(r, DELTA_EUNSUPPORTED, "hidden_act must be silu");
    read_rope(r, text, s);
    s->gdn_k_heads = need(r, text, "linear_num_key_heads", 1024);
    s->gdn_v_heads = need(r, text, "linear_num_value_heads", 1024);
    if (s->gdn_v_heads % s->gdn_k_heads)
        fault(r, DELTA_EFORMAT, "linear_num_value_heads is no multiple of linear_num_key_heads");
    s->gdn_channels = (2 * s->gdn_k_heads + s->gdn_v_heads) * DE_GDN_DIM;
    s->n_experts = need(r, text, "num_experts", 65536);
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

/* Formats whose tensors would not bind: better said by their name. */
static void read_quantization(reader *r, const de_json *root)
{
    const de_json *q = de_json_get(root, "quantization_config");
    if (!q || q->kind != DE_JSON_OBJECT)
        return;
    const de_json *method = de_json_get(q, "quant_method"), *format = de_json_get(q, "format");
    if (method && !de_json_is_string(method, "compressed-tensors"))
        fault(r, DELTA_EUNSUPPORTED, "quant_method is %s, only compressed-tensors is read",
              method->kind == DE_JSON_STRING ? method->text : "no text");
    else if (format && !de_json_is_string(format, "pack-quantized") &&
             !de_json_is_string(format, "mixed-precision"))
        fault(r, DELTA_EUNSUPPORTED, "quantization format is %s, only pack-quantized is read",
              format->kind == DE_JSON_STRING ? format->text : "no text");
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
        fault(&r, DELTA_EUNSUPPORTED, "model_type is \"%s\", this daemon serves qwen3_5_moe",
              type && type->kind == DE_JSON_STRING ? type->text : "");
    else if (!t || t->kind != DE_JSON_OBJECT)
        fault(&r, DELTA_EFORMAT, "text_config is missing");
    else
        read_text(&r, t, &s);
    if (r.code == 0) {
        (void)(de_json_bool(de_json_get(root, "tie_word_embeddings"), &s.tied_embeddings) ||
               de_json_bool(de_json_get(t, "tie_word_embeddings"), &s.tied_embeddings));
        read_vision(&r, root, &s);
        read_quantization(&r, root);
        s.image_token = optional(&r, root, "image_token_id", s.vocab - 1, UINT32_MAX);
        s.video_token = optional(&r, root, "video_token_id", s.vocab - 1, UINT32_MAX);
        s.vision_start_token = optional(&r, root, "vision_start_token_id", s.vocab - 1, UINT32_MAX);
        s.vision_end_token = optional(&r, root, "vision_end_token_id", s.vocab - 1, UINT32_MAX);
    }
    de_arena_done(&arena);
    if (r.code)
        return delta_fail(err, r.code, "config.json: %s", r.faults);
    *ret_shape = s;
    return 0;
}
