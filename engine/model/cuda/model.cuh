/* model.cuh -- the inside of a model on the CUDA backend: what load.cu fills and forward.cu uses.
 *
 * Memory     four allocations: weights in the order of the kernels, KV pages, states, workspace. Nothing is allocated later,
 *            but for the graphs of decode, each made when a step first has its number of rows.
 *            KV     [n_attn][n_pages + 1][page_bytes]; the last page is written by nobody
 *            state  [n_slots][n_gdn][S, conv tail] float: a slot is one piece
 * Threads    one, but for the readers inside de_cu_load(). */
#ifndef DE_MODEL_CUDA_CUH
#define DE_MODEL_CUDA_CUH

#include "kernels/cuda/ops.cuh"

extern "C" {
#include "model/backend.h"
}

struct de_cu_layer {
    enum de_layer_kind kind;
    uint32_t index; /* n-th of its kind */
    float *input_norm, *post_norm;
    de_cu_linear in, out; /* DeltaNet: qkv, z, b, a; attention: q with gate, k, v */
    float *q_norm, *k_norm;
    float *conv, *neg_exp_A, *dt_bias, *gdn_norm;
    de_cu_linear router; /* experts, then the gate of the shared one */
    de_cu_experts experts;
};

struct de_cu_weights {
    bf16 *embed;       /* [vocab][hidden] */
    de_cu_linear head; /* [vocab, hidden] */
    float *norm;
    de_cu_layer *layers; /* host */
};

struct
    de_cu_meta { /* where the parts of a batch's description lie; the same offsets on host and device */
    uint32_t *tokens, (*pos)[3], *out_rows, *pages;
    de_cu_seq *seqs;
};

struct de_cu_done { /* of a sequence of the batch */
    uint32_t rows, marks;
};

struct de_cu_model {
    de_model base;
    de_shape shape;
    de_model_options options;
    de_cu_weights w;
    uint8_t *weights, *kv, *work, *host; /* host: pinned */
    float *state;
    size_t page_bytes, layer_floats, slot_floats;
    float *inv_freq;
    uint8_t *axis;
    cudaStream_t stream;
    cudaGraphExec_t graphs[DE_CU_DECODE_ROWS + 1]; /* by rows */
    bool dependent; /* the device knows programmatic dependent launch */
    /* workspace */
    float *h, *gathered, *router, *rope, *c, *o, *logits;
    bf16 *x, *p, *y;
    void *op;         /* workspace of one operation */
    uint32_t *row_of; /* [max_rows] host: rows of the batch by rows of h */
    /* [max_seqs] host: what of a batch is computed up to its next marks, and was before */
    de_batch_seq *parts;
    de_cu_done *done;
    size_t ldp, ldr, ldy;
    de_cu_meta decode_host, decode, prefill_host, prefill;
    size_t decode_head,
        prefill_bytes; /* bytes before the pages of a decode batch; of a whole prefill batch */
};

/* Bytes of device memory that the weights of b take; offsets of all matrices go to *w (pointers counted from NULL) if w is given. */
int de_cu_weights_plan(const de_shape *s, const de_binding *b, de_cu_weights *w,
                       uint64_t *ret_bytes, delta_error *err);
/* Reads, or with w NULL makes up, all weights into m->weights. */
int de_cu_load(de_cu_model *m, const de_weights *w, const de_binding *b, delta_error *err);

int de_cu_failed(delta_error *err, cudaError_t e, const char *what);

#endif
