/* fuzz_shape.c -- config.json: any bytes; a shape that comes out must keep what shape.h promises. */
#include <stdlib.h>
#include <string.h>

#include "model/shape.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void need(int ok)
{
    if (!ok)
        abort();
}

static void check(const de_shape *s)
{
    need(s->n_layers >= 1 && s->n_layers <= DE_MAX_LAYERS);
    need(s->n_attn + s->n_gdn == s->n_layers);
    uint32_t n[2] = { 0 };
    for (uint32_t i = 0; i < s->n_layers; i++) {
        need(s->layer_kind[i] == DE_LAYER_GDN || s->layer_kind[i] == DE_LAYER_ATTN);
        need(s->kind_index[i] == n[s->layer_kind[i]]++);
    }
    need(n[DE_LAYER_ATTN] == s->n_attn);
    need(s->hidden >= 1 && s->vocab >= 1 && s->ctx_max >= 1 && s->ctx_max <= 1 << 24);
    need(s->rms_eps > 0 && s->rms_eps < 1);
    need(s->q_heads >= 1 && s->kv_heads >= 1 && s->q_heads % s->kv_heads == 0);
    need(s->rotary_dims >= 2 && s->rotary_dims <= DE_ATTN_DIM && s->rotary_dims % 2 == 0);
    need(s->rope_theta > 1);
    need(s->mrope_section[0] + s->mrope_section[1] + s->mrope_section[2] == s->rotary_dims / 2);
    if (s->yarn) {
        need(s->yarn_factor >= 1 && s->yarn_attention_factor > 0 && s->yarn_original_ctx >= 1);
        need(s->yarn_beta_slow > 0 && s->yarn_beta_fast > s->yarn_beta_slow);
    }
    need(s->gdn_k_heads >= 1 && s->gdn_v_heads % s->gdn_k_heads == 0);
    need(s->gdn_channels == (2 * s->gdn_k_heads + s->gdn_v_heads) * DE_GDN_DIM);
    need(s->n_experts >= 1 && s->n_experts <= DE_MAX_EXPERTS);
    need(s->top_k >= 1 && s->top_k <= s->n_experts && s->moe_width >= 1 && s->shared_width >= 1);
    if (s->has_vision)
        need(s->vision.heads >= 1 && s->vision.hidden % s->vision.heads == 0);
    need(s->image_token == UINT32_MAX || s->image_token < s->vocab);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    de_shape s;
    delta_error err = { 0 };
    char *text = malloc(size ? size : 1); /* so that a read beyond the end is seen */
    if (!text)
        return 0;
    if (size)
        memcpy(text, data, size);
    if (de_shape_parse(text, size, &s, &err) == 0)
        check(&s);
    else
        need(err.text[0] && !strchr(err.text, '\n'));
    free(text);
    return 0;
}
