/* backend.h -- what computes: a table of functions at the level of a whole forward, one table a
 * backend, and what all models have in common.
 *
 * model.c checks arguments and calls through the table; nobody else does. A backend's model begins
 * with a de_model, which model.c fills behind open(). */
#ifndef DE_BACKEND_H
#define DE_BACKEND_H

#include "model/forward.h"

struct de_backend {
    const char *name;
    uint32_t rows; /* of a forward that are worth computing at once */
    /* Memory on the host, zeroed, that the backend writes logits to without a copy of its own. */
    void *(*host_alloc)(size_t bytes);
    void (*host_free)(void *p);
    /* Bytes a second that a plain reading kernel reaches; NULL: not known. */
    int (*read_rate)(double *ret_rate);
    /* Memory that weights, KV, states and workspace must share; 0: there is no such device. */
    uint64_t (*memory_bytes)(void);
    int (*plan)(const de_shape *s, const de_binding *b, const de_model_options *o,
                de_memory_plan *ret_plan, delta_error *err);
    /* w NULL: random weights in the binding's formats */
    int (*open)(const de_weights *w, const de_shape *s, const de_binding *b,
                const de_model_options *o, de_model **ret_m, delta_error *err);
    void (*free)(de_model *m);
    int (*forward)(de_model *m, const de_batch *batch, float *logits, const de_capture *capture,
                   delta_error *err);
    int (*wait)(de_model *m, delta_error *err); /* NULL: nothing is ever under way */
    void (*slot_clear)(de_model *m, uint32_t slot);
    size_t (*slot_bytes)(const de_model *m);
    int (*slot_save)(de_model *m, uint32_t slot, void *dst, delta_error *err);
    int (*slot_load)(de_model *m, uint32_t slot, const void *src, delta_error *err);
    int (*slot_copy)(de_model *m, uint32_t from, uint32_t to, delta_error *err);
    size_t (*page_bytes)(const de_model *m);
    int (*page_save)(de_model *m, uint32_t page, void *dst, delta_error *err);
    int (*page_load)(de_model *m, uint32_t page, const void *src, delta_error *err);
    int (*page_copy)(de_model *m, uint32_t from, uint32_t to, delta_error *err);
};

struct de_model {
    const de_backend *backend;
    de_shape shape;
    de_model_options options;
};

extern const de_backend de_backend_cpu;
#ifdef DELTA_CUDA
extern const de_backend de_backend_cuda;
#endif

#endif
