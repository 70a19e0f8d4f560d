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
#include "kernels/cuda/top_logits.cuh"

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

/* Rows of prefill that the delta rule takes at once: those of a sequence up to a mark, or of neighbours without marks. */
struct de_cu_piece {
    uint32_t row, rows, max_rows; /* rows [row, row + rows) of the batch */
    uint32_t seq, n_seqs; /* described by seqs [seq, seq + n_seqs), whose rows count from row */
    uint32_t slot, mark;  /* the state at its end goes from slot to mark; UINT32_MAX: it does not */
};

enum { DE_CU_SAVES = 1024, DE_CU_ADDRESSES = 16384 };

struct de_cu_addresses { /* of pages on the host, hashed */
    const void *of[DE_CU_ADDRESSES];
    uint32_t n;
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
    /* Copies of pages to the host go on a stream of their own, beside those from it. Who writes to such a page waits for its copy; a
     * copy of a page, or to a page, that `stream` is not known to be done with waits for that. */
    cudaStream_t out;
    cudaEvent_t saved[DE_CU_SAVES],
        ready;                   /* saved: of save number i, or a later one, at i % DE_CU_SAVES */
    uint64_t n_saved, n_awaited; /* saves; stream waits for so many of them */
    uint64_t *saved_as;          /* [n_pages + 1] number of its last save, from 1 */
    uint64_t epoch,
        *written_in; /* [n_pages + 1] the epoch in which stream wrote to it; one ends when stream is idle */
    de_cu_addresses loaded, saved_to; /* in this epoch, by stream and by out */
    de_cu_pages to_save, to_load;     /* not begun yet: flush_saves(), flush_loads() */
    bool saves_wait;                  /* the former come behind what stream has to do */
    uint64_t loads_wait;              /* the latter come behind that save */
    bool dependent;                   /* the device knows programmatic dependent launch */
    /* workspace */
    float *h, *gathered, *router, *rope, *c, *o, *logits;
    bf16 *x, *p, *y;
    void *op;                        /* workspace of one operation */
    uint32_t *row_of;                /* [max_rows] host: rows of the batch by rows of h */
    de_cu_piece *pieces;             /* host: of a batch of prefill */
    de_top_logits *tops, *tops_host; /* [ROWS] of logits */
    void *maxima;                    /* workspace of theirs */
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
