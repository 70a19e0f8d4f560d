/* bind.h -- tensor names to a typed table of what a forward needs.
 *
 * Which format a linear has is decided by the keys that exist (X.weight or
 * X.weight_packed + X.weight_scale [+ X.weight_shape]), not by the config.
 * Experts may be per-expert linears or fused 3-D tensors; either way each
 * expert is bound as three linears. Name prefixes are tolerated as spec'd:
 * model.language_model., language_model.model., model.
 * Fused experts may be packed too (X.weight_packed [E, rows, words]).
 * All mismatches (missing, wrong shape, wrong dtype) are reported in one error.
 * Vision and MTP tensors are recognised and counted, not bound yet; a tensor
 * nobody knows is a mismatch too. Tensors of other quantizations (GPTQ, AWQ,
 * FP8, zero points, 4-bit, ...) are refused by their name.
 * docs/FORMATS.md lists what is read.
 *
 * Reads      names, dtypes and shapes, and the data of X.weight_shape. Scales
 *            and weights are not looked at.
 * Threads    a binding is immutable. It refers to shards by number: it does not
 *            need the de_weights it came from. */
#ifndef DE_BIND_H
#define DE_BIND_H

#include <stdbool.h>
#include <stdint.h>

#include "model/shape.h"
#include "model/weights.h"

/* A tensor, or a contiguous part of one, in a shard. bytes == 0: absent. */
typedef struct de_ref {
    uint32_t shard;
    enum de_dtype dtype;
    uint64_t offset, bytes;
} de_ref;

enum de_linear_format {
    DE_LINEAR_FLOAT, /* weight: dtype BF16, F16 or F32, row-major [out, in] */
    DE_LINEAR_INT8,  /* weight: bytes [out, in], value = byte - 128, times scale */
};

typedef struct de_linear_ref {
    enum de_linear_format format;
    uint32_t out, in;
    uint32_t group; /* INT8: columns of one scale; == in for one scale a row */
    de_ref weight;  /* INT8: rows are in bytes each, tightly packed if in % 4 == 0, else
                         row_bytes apart */
    uint32_t row_bytes;
    de_ref scale;     /* INT8: [out, in / group] of its dtype; may be negative */
    bool scale_whole; /* INT8: one scale [1] for the whole tensor instead */
} de_linear_ref;

typedef struct de_expert_ref {
    de_linear_ref gate, up, down;
} de_expert_ref;

typedef struct de_layer_ref {
    enum de_layer_kind kind;
    de_ref input_norm, post_norm; /* [hidden], delta around 0 */
    /* attention */
    de_linear_ref q, k, v, o;
    de_ref q_norm, k_norm; /* [256], delta around 0 */
    /* Gated DeltaNet */
    de_linear_ref qkv, z, b, a, out;
    de_ref conv;           /* [channels, 1, 4] */
    de_ref A_log, dt_bias; /* [v_heads] */
    de_ref gdn_norm;       /* [128], plain */
    /* experts */
    de_linear_ref router;   /* [E, hidden] */
    de_expert_ref *experts; /* [E] */
    de_expert_ref shared;
    de_linear_ref shared_gate; /* [1, hidden] */
} de_layer_ref;

typedef struct de_binding {
    de_linear_ref embed; /* [vocab, hidden], format FLOAT */
    de_linear_ref head;  /* [vocab, hidden]; equals embed if tied */
    de_ref norm;
    uint32_t n_layers;
    de_layer_ref *layers;
    uint64_t n_parameters; /* of the text model, as stored values */
    uint32_t n_vision_tensors, n_mtp_tensors;
    /* "int8 channel", "int8 group 128", "int8 tensor", "int8 mixed", "bf16", "f16", "f32" */
    char quantization[64];
} de_binding;

/* DELTA_EFORMAT, or DELTA_EUNSUPPORTED if a form that is not read was found: err says how many
 * mismatches there are, and the first of them. DELTA_ENOMEM. */
int de_bind(const de_weights *w, const de_shape *shape, de_binding **ret_b, delta_error *err);
/* The same; on a mismatch *ret_report (if ret_report is not NULL and memory allows; else untouched)
 * lists all of them, one a line, at most 10,000. free() it. */
int de_bind_report(const de_weights *w, const de_shape *shape, de_binding **ret_b,
                   char **ret_report, delta_error *err);
void de_binding_free(de_binding *b);

#endif
