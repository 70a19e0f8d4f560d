/* model.c -- a model on whichever backend: checks what every backend may rely on, then calls it. */
#include <stdlib.h>
#include <string.h>

#include "base/bits.h"
#include "model/backend.h"

const de_backend *de_backend_find(const char *name)
{
#ifdef DELTA_CUDA
    if (strcmp(name, "cuda") == 0)
        return &de_backend_cuda;
    if (strcmp(name, "auto") == 0 && de_backend_cuda.memory_bytes() > 0)
        return &de_backend_cuda;
#endif
    return strcmp(name, "cpu") == 0 || strcmp(name, "auto") == 0 ? &de_backend_cpu : NULL;
}

const char *de_backend_name(const de_backend *b)
{
    return b->name;
}

uint32_t de_backend_rows(const de_backend *b)
{
    return b->rows;
}

uint64_t de_backend_memory(const de_backend *b)
{
    return b->memory_bytes();
}

int de_backend_read_rate(const de_backend *b, double *ret_rate)
{
    return b->read_rate ? b->read_rate(ret_rate) : DELTA_EUNSUPPORTED;
}

void *de_backend_host_alloc(const de_backend *b, size_t bytes)
{
    return b->host_alloc(bytes);
}

void de_backend_host_free(const de_backend *b, void *p)
{
    b->host_free(p);
}

static int check_options(const de_model_options *o, delta_error *err)
{
    if (!o->n_slots || !o->n_pages || !o->max_rows || !o->max_seqs || !o->max_out || !o->ctx_max)
        return delta_fail(err, DELTA_EINVALID,
                          "model: slots, pages, rows, sequences, outputs and "
                          "context must not be 0");
    return 0;
}

static const de_backend *backend_of(const de_model_options *o)
{
    return o->backend ? o->backend : &de_backend_cpu;
}

int de_model_plan(const de_shape *s, const de_binding *b, const de_model_options *o,
                  de_memory_plan *ret_plan, delta_error *err)
{
    int r = check_options(o, err);
    return r < 0 ? r : backend_of(o)->plan(s, b, o, ret_plan, err);
}

int de_model_open(const de_weights *w, const de_shape *shape, const de_binding *b,
                  const de_model_options *o, de_model **ret_m, delta_error *err)
{
    int r = check_options(o, err);
    if (r == 0)
        r = backend_of(o)->open(w, shape, b, o, ret_m, err);
    if (r < 0)
        return r;
    (*ret_m)->backend = backend_of(o);
    (*ret_m)->shape = *shape;
    (*ret_m)->options = *o;
    return 0;
}

void de_model_free(de_model *m)
{
    if (m)
        m->backend->free(m);
}

static int check_batch(const de_model *m, const de_batch *b, delta_error *err)
{
    const de_model_options *o = &m->options;
    if (b->n_rows > o->max_rows || b->n_seqs > o->max_seqs || b->n_out > o->max_out ||
        b->n_out > b->n_rows)
        return delta_fail(err, DELTA_EINVALID,
                          "batch of %u rows, %u sequences, %u outputs; the "
                          "model takes %u, %u, %u",
                          b->n_rows, b->n_seqs, b->n_out, o->max_rows, o->max_seqs, o->max_out);
    for (uint32_t r = 0; r < b->n_rows; r++)
        if (b->tokens[r] >= m->shape.vocab)
            return delta_fail(err, DELTA_EINVALID, "row %u: token %u, the vocabulary has %u", r,
                              b->tokens[r], m->shape.vocab);
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const de_batch_seq *q = &b->seqs[i];
        if (q->slot >= o->n_slots || (uint64_t)q->row + q->n_rows > b->n_rows ||
            q->n_out > q->n_rows || (uint64_t)q->first_out + q->n_out > b->n_out ||
            (uint64_t)q->start + q->n_rows > o->ctx_max)
            return delta_fail(err, DELTA_EINVALID, "sequence %u of the batch is out of range", i);
        if (q->n_marks && q->n_out > 1)
            return delta_fail(err, DELTA_EINVALID, "sequence %u: marks, and %u rows of logits", i,
                              q->n_out);
        uint32_t before = q->start;
        for (uint32_t k = 0; k < q->n_marks; k++) {
            const de_batch_mark *mark = &q->marks[k];
            if (mark->end <= before || mark->end > q->start + q->n_rows || mark->end % DE_CHUNK ||
                mark->slot >= o->n_slots || mark->slot == q->slot)
                return delta_fail(err, DELTA_EINVALID, "sequence %u: mark %u at %u, slot %u", i, k,
                                  mark->end, mark->slot);
            before = mark->end;
        }
        if (q->decode && q->n_rows != 1)
            return delta_fail(err, DELTA_EINVALID, "sequence %u: %u rows in decode", i, q->n_rows);
        for (uint32_t p = 0; p < de_ceil_div((uint64_t)q->start + q->n_rows, DE_PAGE); p++)
            if (q->pages[p] >= o->n_pages)
                return delta_fail(err, DELTA_EINVALID, "sequence %u: page %u", i, q->pages[p]);
    }
    return 0;
}

int de_forward(de_model *m, const de_batch *b, float *logits, const de_capture *capture,
               delta_error *err)
{
    int r = check_batch(m, b, err);
    return r < 0 ? r : m->backend->forward(m, b, logits, capture, err);
}

int de_model_wait(de_model *m, delta_error *err)
{
    return m->backend->wait ? m->backend->wait(m, err) : 0;
}

void de_model_slot_clear(de_model *m, uint32_t slot)
{
    m->backend->slot_clear(m, slot);
}

size_t de_model_slot_bytes(const de_model *m)
{
    return m->backend->slot_bytes(m);
}

int de_model_slot_save(de_model *m, uint32_t slot, void *dst, delta_error *err)
{
    return m->backend->slot_save(m, slot, dst, err);
}

int de_model_slot_load(de_model *m, uint32_t slot, const void *src, delta_error *err)
{
    return m->backend->slot_load(m, slot, src, err);
}

int de_model_slot_copy(de_model *m, uint32_t from, uint32_t to, delta_error *err)
{
    return m->backend->slot_copy(m, from, to, err);
}

size_t de_model_page_bytes(const de_model *m)
{
    return m->backend->page_bytes(m);
}

int de_model_page_save(de_model *m, uint32_t page, void *dst, delta_error *err)
{
    return m->backend->page_save(m, page, dst, err);
}

int de_model_page_load(de_model *m, uint32_t page, const void *src, delta_error *err)
{
    return m->backend->page_load(m, page, src, err);
}

int de_model_page_copy(de_model *m, uint32_t from, uint32_t to, delta_error *err)
{
    return m->backend->page_copy(m, from, to, err);
}

int de_model_slot_peek(de_model *m, uint32_t slot, uint32_t gdn_layer, float *recurrent,
                       float *conv, delta_error *err)
{
    const de_shape *s = &m->shape;
    const size_t channels = s->gdn_channels, n = (size_t)s->gdn_v_heads * DE_GDN_DIM * DE_GDN_DIM;
    float *all = malloc(de_model_slot_bytes(m));
    if (!all)
        return delta_fail(err, DELTA_ENOMEM, "state of a slot");
    int r = de_model_slot_save(m, slot, all, err);
    const float *layer = all + gdn_layer * (n + (DE_CONV_WIDTH - 1) * channels);
    if (r == 0)
        memcpy(recurrent, layer, n * sizeof *recurrent);
    for (size_t c = 0; r == 0 && c < channels; c++)
        for (size_t j = 0; j < DE_CONV_WIDTH - 1; j++)
            conv[c * (DE_CONV_WIDTH - 1) + j] = layer[n + j * channels + c];
    free(all);
    return r;
}
