/* synthetic.c -- see synthetic.h. */
#include "model/synthetic.h"

#include <stdio.h>
#include <stdlib.h>

void de_synthetic_35b(de_shape *ret_shape)
{
    *ret_shape = (de_shape){
        .n_layers = 40,
        .hidden = 2048,
        .vocab = 248320,
        .rms_eps = 1e-6f,
        .q_heads = 16,
        .kv_heads = 2,
        .rotary_dims = 64,
        .rope_theta = 1e7,
        .mrope_section = { 11, 11, 10 },
        .gdn_k_heads = 16,
        .gdn_v_heads = 32,
        .gdn_channels = (2 * 16 + 32) * DE_GDN_DIM,
        .n_experts = 256,
        .top_k = 8,
        .moe_width = 512,
        .shared_width = 512,
        .ctx_max = 262144,
        .image_token = UINT32_MAX,
        .video_token = UINT32_MAX,
        .vision_start_token = UINT32_MAX,
        .vision_end_token = UINT32_MAX,
    };
    for (uint32_t i = 0; i < ret_shape->n_layers; i++) {
        const bool attn = i % 4 == 3;
        ret_shape->layer_kind[i] = attn ? DE_LAYER_ATTN : DE_LAYER_GDN;
        ret_shape->kind_index[i] = attn ? ret_shape->n_attn++ : ret_shape->n_gdn++;
    }
}

static de_linear_ref linear(uint32_t out, uint32_t in, bool int8)
{
    return (de_linear_ref){ .format = int8 ? DE_LINEAR_INT8 : DE_LINEAR_FLOAT,
                            .out = out,
                            .in = in,
                            .group = in,
                            .weight = { .dtype = int8 ? DE_I32 : DE_BF16 },
                            .scale = { .dtype = DE_BF16 },
                            .row_bytes = int8 ? in : 2 * in };
}

static de_expert_ref expert(const de_shape *s, uint32_t width, bool int8)
{
    return (de_expert_ref){ linear(width, s->hidden, int8), linear(width, s->hidden, int8),
                            linear(s->hidden, width, int8) };
}

int de_synthetic_binding(const de_shape *s, de_binding **ret_b, delta_error *err)
{
    de_binding *b = calloc(1, sizeof *b);
    if (b)
        b->layers = calloc(s->n_layers, sizeof *b->layers);
    if (!b || !b->layers) {
        free(b);
        return delta_fail(err, DELTA_ENOMEM, "binding of %u layers", s->n_layers);
    }
    b->n_layers = s->n_layers;
    b->embed = b->head = linear(s->vocab, s->hidden, false);
    (void)snprintf(b->quantization, sizeof b->quantization, "int8 channel");
    for (uint32_t i = 0; i < s->n_layers; i++) {
        de_layer_ref *l = &b->layers[i];
        l->kind = s->layer_kind[i];
        l->q = linear(s->q_heads * 2 * DE_ATTN_DIM, s->hidden, true);
        l->k = l->v = linear(s->kv_heads * DE_ATTN_DIM, s->hidden, true);
        l->o = linear(s->hidden, s->q_heads * DE_ATTN_DIM, true);
        l->qkv = linear(s->gdn_channels, s->hidden, false);
        l->z = linear(s->gdn_v_heads * DE_GDN_DIM, s->hidden, false);
        l->b = l->a = linear(s->gdn_v_heads, s->hidden, false);
        l->out = linear(s->hidden, s->gdn_v_heads * DE_GDN_DIM, false);
        l->router = linear(s->n_experts, s->hidden, false);
        l->shared_gate = linear(1, s->hidden, false);
        l->shared = expert(s, s->shared_width, false);
        l->experts = calloc(s->n_experts, sizeof *l->experts);
        if (!l->experts) {
            de_binding_free(b);
            return delta_fail(err, DELTA_ENOMEM, "table of %u experts", s->n_experts);
        }
        for (uint32_t e = 0; e < s->n_experts; e++)
            l->experts[e] = expert(s, s->moe_width, true);
    }
    *ret_b = b;
    return 0;
}
