/* model.h -- the inside of a model on the CPU backend: what forward.c and
 * the layers share.
 *
 * Memory, per attention layer and page: K transposed [kv_heads][256][64 tokens],
 * V [kv_heads][64][256], so that both products of attention are chains over
 * the summed index, vectorised over tokens and over dims. Per slot and DeltaNet
 * layer: S [v_heads][128 k][128 v] and the last three conv inputs
 * [3][channels], oldest first. All f32. */
#ifndef DE_CPU_MODEL_H
#define DE_CPU_MODEL_H

#include "kernels/cpu/hot.h"
#include "kernels/cpu/pool.h"
#include "model/backend.h"

typedef struct de_cpu_model de_cpu_model;

typedef struct de_expert {
    de_panels gate, up, down;
} de_expert;

typedef struct de_layer {
    enum de_layer_kind kind;
    uint32_t index; /* n-th of its kind */
    float *input_norm, *post_norm;
    /* attention */
    de_panels q, k, v, o;
    float *q_norm, *k_norm;
    /* Gated DeltaNet */
    de_panels qkv, z, b, a, out;
    float *conv;                /* [4][channels] */
    float *neg_exp_A, *dt_bias; /* [v_heads]: -exp(A_log) */
    float *gdn_norm;
    /* experts; [E] is the shared one */
    de_panels router, shared_gate;
    de_expert *experts;
} de_layer;

struct de_cpu_model {
    de_model base;
    de_shape shape;
    de_model_options options;
    de_memory_plan plan;
    const de_hot *hot;
    de_pool *pool;
    de_panels embed, head; /* embed: only its rows are read, one by one */
    float *norm;
    de_layer *layers;
    float *inv_freq; /* [rotary_dims / 2] */
    float *kv;       /* [n_attn][n_pages][page_floats] */
    float *state;    /* [n_slots][slot_floats] */
    size_t page_floats, slot_floats, slot_layer_floats;
    /* workspace of one forward; T = max_rows */
    float *h, *x, *y;       /* [T, hidden] */
    float *wide[3];         /* [T, widest] each */
    float *small[2];        /* [T, v_heads] */
    float *mixed;           /* [T, max(q_heads * 256, v_heads * 128)] */
    float *rope;            /* [T][2][rotary_dims / 2]: cos, sin */
    float *router;          /* [T, E padded to 16] */
    uint32_t *top_id;       /* [T, top_k], ascending expert */
    float *top_w;           /* [T, top_k] */
    uint32_t *expert_first; /* [E + 1] */
    uint32_t *expert_slot;  /* [T * top_k]: row * top_k + j, grouped by expert */
    float *expert_out;      /* [T, top_k + 1, hidden]; the last is the shared one */
    float *shared_gate;     /* [T, 16] */
    float *scratch;         /* [threads][scratch_floats] */
    size_t scratch_floats;
    void *memory; /* the workspace's block */
};

/* upload.c: weights from the checkpoint into panels. */
/* What de_upload() will allocate. */
uint64_t de_upload_bytes(const de_shape *s, const de_binding *b);
int de_upload(de_cpu_model *m, const de_weights *w, const de_binding *b, delta_error *err);
void de_upload_free(de_cpu_model *m);
/* Row `id` of the embedding. */
void de_embed_row(const de_cpu_model *m, uint32_t id, float *out);

/* y [rows, out] = x [rows, in] W', on all threads. */
void de_linear(de_cpu_model *m, const de_panels *w, const float *x, size_t ldx, uint32_t rows,
               float *y, size_t ldy);

/* The mixers read m->x [T, hidden] (normed) and write m->y [T, hidden]. */
void de_layer_gdn(de_cpu_model *m, const de_layer *l, const de_batch *batch);
void de_layer_attn(de_cpu_model *m, const de_layer *l, const de_batch *batch);
void de_layer_moe(de_cpu_model *m, const de_layer *l, uint32_t n_rows);

static inline float *de_slot_state(const de_cpu_model *m, uint32_t slot, uint32_t gdn_layer)
{
    return m->state + slot * m->slot_floats + gdn_layer * m->slot_layer_floats;
}
static inline float *de_slot_conv(const de_cpu_model *m, uint32_t slot, uint32_t gdn_layer)
{
    return de_slot_state(m, slot, gdn_layer) +
           (size_t)m->shape.gdn_v_heads * DE_GDN_DIM * DE_GDN_DIM;
}
static inline float *de_page(const de_cpu_model *m, uint32_t attn_layer, uint32_t page)
{
    return m->kv + ((size_t)attn_layer * m->options.n_pages + page) * m->page_floats;
}

#endif
