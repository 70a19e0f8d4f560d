/* shape.h -- config.json to every dimension of the model, checked once.
 *
 * Field names are those of config.json where it has one. Nothing else in the
 * engine reads config.json, but for the ids that end a turn (api/checkpoint.h). */
#ifndef DE_SHAPE_H
#define DE_SHAPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/error.h"

enum {
    DE_MAX_LAYERS = 128,
    DE_MAX_EXPERTS = 1024,
    DE_ATTN_DIM = 256, /* head_dim: fixed, kernels rely on it */
    DE_GDN_DIM = 128,  /* linear_key_head_dim = linear_value_head_dim: fixed */
    DE_CONV_WIDTH = 4, /* linear_conv_kernel_dim: fixed */
};

enum de_layer_kind { DE_LAYER_GDN, DE_LAYER_ATTN };

typedef struct de_vision_shape {
    uint32_t depth, hidden, heads, intermediate, patch, temporal_patch, merge, positions,
        out_hidden;
} de_vision_shape;

typedef struct de_shape {
    uint32_t n_layers, hidden, vocab;
    uint8_t layer_kind[DE_MAX_LAYERS];  /* enum de_layer_kind */
    uint32_t n_attn, n_gdn;             /* layers of each kind */
    uint32_t kind_index[DE_MAX_LAYERS]; /* n-th layer of its kind, from 0 */
    float rms_eps;
    /* attention */
    uint32_t q_heads, kv_heads, rotary_dims; /* rotary_dims <= 256, even */
    double rope_theta;
    uint32_t mrope_section[3]; /* sums to rotary_dims / 2 */
    bool yarn;
    /* attention_factor: multiplies cos and sin; as given, else from mscale, else 0.1 ln(factor) + 1 */
    double yarn_factor, yarn_beta_fast, yarn_beta_slow, yarn_attention_factor;
    uint32_t yarn_original_ctx;
    /* Gated DeltaNet */
    uint32_t gdn_k_heads, gdn_v_heads; /* v_heads is a multiple of k_heads */
    uint32_t gdn_channels;             /* conv channels: (2 k_heads + v_heads) * 128 */
    /* experts */
    uint32_t n_experts, top_k, moe_width, shared_width;
    /* max_position_embeddings; with YaRN at least factor * original, at most 2^24 */
    uint32_t ctx_max;
    bool tied_embeddings; /* the head is the embedding where lm_head is absent */
    uint32_t mtp_layers;
    bool has_vision;
    de_vision_shape vision;
    /* UINT32_MAX: not given */
    uint32_t image_token, video_token, vision_start_token, vision_end_token;
} de_shape;

/* text: config.json, len bytes. Unknown keys are ignored; every missing or impossible value is
 * named. DELTA_EFORMAT, or DELTA_EUNSUPPORTED for another architecture or a fixed dimension. */
int de_shape_parse(const char *text, size_t len, de_shape *ret_shape, delta_error *err);
/* The same of DIR/config.json, at most 16 MiB; also the errors of de_file_read(). */
int de_shape_read(const char *dir, de_shape *ret_shape, delta_error *err);

#endif
