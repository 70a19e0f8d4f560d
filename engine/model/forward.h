/* forward.h -- the model: weights on a backend, and one forward over a batch.
 *
 * Ownership  the model owns weights, KV pages, state slots and workspace; all
 *            are allocated by de_model_open(), nothing later.
 * Threads    one thread. */
#ifndef DE_FORWARD_H
#define DE_FORWARD_H

#include "delta/error.h"
#include "model/batch.h"
#include "model/bind.h"
#include "model/shape.h"

typedef struct de_model de_model;
typedef struct de_backend de_backend;

/* "cpu", "cuda", or "auto": cuda where this build has it and the machine a device. NULL: not in
 * this build. */
const de_backend *de_backend_find(const char *name);
const char *de_backend_name(const de_backend *b);
/* Bytes of the memory that a model on it must fit in; 0: there is no device. */
uint64_t de_backend_memory(const de_backend *b);
/* Rows of a forward that are worth computing at once. */
uint32_t de_backend_rows(const de_backend *b);
/* Measures how many bytes a second the memory can be read with, the limit of decode. < 0: this
 * backend does not tell. */
int de_backend_read_rate(const de_backend *b, double *ret_rate);
/* Memory on the host, zeroed: logits that lie in it are written fastest. NULL: there is none. */
void *de_backend_host_alloc(const de_backend *b, size_t bytes);
void de_backend_host_free(const de_backend *b, void *p);

enum de_kv_type { DE_KV_AUTO, DE_KV_BF16, DE_KV_FP8 };

typedef struct de_model_options {
    const de_backend *backend; /* NULL: cpu */
    enum de_kv_type kv_type;   /* cuda: DE_KV_AUTO is BF16. cpu: AUTO alone, F32 */
    uint32_t threads;          /* of the CPU backend; 0: all cores */
    uint32_t n_slots;          /* state slots */
    uint32_t n_pages;          /* KV pages of DE_PAGE tokens, shared by all attention layers */
    uint32_t max_rows;         /* of one batch */
    uint32_t max_seqs;         /* of one batch */
    uint32_t max_out;          /* rows with logits of one batch */
    uint32_t ctx_max;          /* longest sequence */
    void (*on_progress)(void *arg, const char *phase, uint64_t done, uint64_t total);
    void *arg;
} de_model_options;

typedef struct de_memory_plan {
    uint64_t weights_bytes, kv_bytes, state_bytes, workspace_bytes;
} de_memory_plan;

/* What de_model_open() would take, without taking it. */
int de_model_plan(const de_shape *shape, const de_binding *b, const de_model_options *o,
                  de_memory_plan *ret_plan, delta_error *err);

/* w NULL: random weights in the formats of b (backend cuda). */
int de_model_open(const de_weights *w, const de_shape *shape, const de_binding *b,
                  const de_model_options *o, de_model **ret_m, delta_error *err);
void de_model_free(de_model *m);

/* Where to copy inner values to (tests, delta-golden); any pointer may be NULL. */
typedef struct de_capture {
    float *embed;   /* [n_rows, hidden] */
    float **layers; /* [n_layers] of [n_rows, hidden]: after both residual adds */
    float *norm;    /* [n_rows, hidden]: after the final norm */
} de_capture;

/* One forward. logits: f32 [n_out, vocab], written. Updates pages and slots. */
int de_forward(de_model *m, const de_batch *batch, float *logits, const de_capture *capture,
               delta_error *err);

/* The copies below, to and from memory of de_backend_host_alloc(), may be under way yet when they return, in order with all else that
 * the model does. Until this has returned nobody else reads or writes that memory. DELTA_EIO: the device failed. */
int de_model_wait(de_model *m, delta_error *err);
/* A slot as at the start of a sequence. */
void de_model_slot_clear(de_model *m, uint32_t slot);
/* Copies of a slot's state (checkpoints); size of one copy in bytes. Each DeltaNet layer in turn:
 * f32 S [v_heads][128 key][128 value], then the conv's last three inputs [3][channels], oldest
 * first. DELTA_EIO: the device failed. */
size_t de_model_slot_bytes(const de_model *m);
int de_model_slot_save(de_model *m, uint32_t slot, void *dst, delta_error *err);
int de_model_slot_load(de_model *m, uint32_t slot, const void *src, delta_error *err);
/* Copies on the device; from != to. */
int de_model_slot_copy(de_model *m, uint32_t from, uint32_t to, delta_error *err);
int de_model_page_copy(de_model *m, uint32_t from, uint32_t to, delta_error *err);
/* Copies of a KV page, of all attention layers in turn, in the backend's own layout. */
size_t de_model_page_bytes(const de_model *m);
int de_model_page_save(de_model *m, uint32_t page, void *dst, delta_error *err);
int de_model_page_load(de_model *m, uint32_t page, const void *src, delta_error *err);
/* For tests: f32 [v_heads, 128 key, 128 value] and f32 [channels, 3] (oldest first) of the n-th
 * DeltaNet layer. */
int de_model_slot_peek(de_model *m, uint32_t slot, uint32_t gdn_layer, float *recurrent,
                       float *conv, delta_error *err);

#endif
