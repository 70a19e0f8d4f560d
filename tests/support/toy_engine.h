/* toy_engine.h -- a model and a tokenizer of a few lines, which take the place of the real ones at link
 * time.
 *
 * The model's state is a hash of all it was given, of every position included at which a prefill was
 * cut off a multiple of DE_CHUNK (unless toy_ignores_cuts): if the engine cut according to load,
 * tokens would differ. A page holds a hash of the tokens up to each of its positions, and every
 * forward looks whether the pages of a sequence hold what is its own.
 * Token i < 256 is the byte i; 300 is "<tag>", added; 400 ends a turn. */
#ifndef TOY_ENGINE_H
#define TOY_ENGINE_H

#include "support/engine_steps.h"

#include "model/forward.h"

enum {
    VOCAB = 2048,
    TOKENS = 500,
    TAG = 300, /* what engine_steps.h counts */
    CLOSE = 301,
    EOS = 400,
    NAN_TOKEN = 401,
    FAULT_TOKEN = 402
};

/* ---- the tokenizer ---- */

struct delta_tokenizer {
    int unused;
};
static struct delta_tokenizer the_tokenizer;
int delta_tokenizer_open(const char *dir, delta_tokenizer **ret_tok, delta_error *err)
{
    (void)dir, (void)err;
    *ret_tok = &the_tokenizer;
    return 0;
}
void delta_tokenizer_free(delta_tokenizer *t)
{
    (void)t;
}
uint32_t delta_tokenizer_size(const delta_tokenizer *t)
{
    (void)t;
    return TOKENS;
}
enum delta_token_kind delta_token_kind(const delta_tokenizer *t, uint32_t id)
{
    (void)t;
    return id < 256                   ? DELTA_TOKEN_TEXT
           : id == TAG || id == CLOSE ? DELTA_TOKEN_ADDED
           : id == EOS                ? DELTA_TOKEN_SPECIAL
                                      : DELTA_TOKEN_NONE;
}
const uint8_t *delta_token_bytes(const delta_tokenizer *t, uint32_t id, size_t *ret_len)
{
    static uint8_t bytes[256];
    (void)t;
    *ret_len = id < 256 ? 1 : id == TAG || id == EOS ? 5 : id == CLOSE ? 8 : 0;
    if (id == CLOSE)
        return (const uint8_t *)"</think>";
    if (id >= 256)
        return *ret_len ? (const uint8_t *)"<tag>" : NULL;
    bytes[id] = (uint8_t)id;
    return &bytes[id];
}
int64_t delta_tokenizer_added_id(const delta_tokenizer *t, const char *text)
{
    (void)t;
    return strcmp(text, "</think>") == 0 ? CLOSE : -1;
}
/* Bytes, and "</think>". */
int delta_tokenize(const delta_tokenizer *t, const char *text, size_t len, bool plain,
                   uint32_t **ret_ids, size_t *ret_n, delta_error *err)
{
    (void)t, (void)plain, (void)err;
    uint32_t *ids = malloc((len + 1) * sizeof *ids);
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        const bool closes = len - i >= 8 && memcmp(text + i, "</think>", 8) == 0;
        ids[n++] = closes ? CLOSE : (uint8_t)text[i];
        i += closes ? 7 : 0;
    }
    *ret_ids = ids;
    *ret_n = n;
    return 0;
}
/* ASCII, and two-byte characters. */
size_t delta_detok_push(delta_detok *d, const uint8_t *bytes, size_t len, char *out, size_t cap)
{
    size_t n = 0;
    for (size_t i = 0; i < len && n + 3 < cap; i++) {
        if (bytes[i] >= 0xc2 && bytes[i] < 0xe0 && !d->n_held) {
            d->held[d->n_held++] = bytes[i];
            continue;
        }
        if (d->n_held) {
            d->n_held = 0;
            out[n++] = (char)d->held[0];
        }
        out[n++] = (char)bytes[i];
    }
    return n;
}
size_t delta_detok_flush(delta_detok *d, char *out, size_t cap)
{
    (void)cap;
    if (!d->n_held)
        return 0;
    d->n_held = 0;
    memcpy(out, "\xef\xbf\xbd", 3);
    return 3;
}

/* ---- the model ---- */

struct toy_slot {
    uint64_t hash;  /* of tokens and cuts */
    uint64_t chain; /* of tokens alone */
    uint32_t n;
};
struct toy_entry {
    uint64_t chain;
    uint32_t token;
};
struct de_model {
    de_model_options o;
    struct toy_slot *slot;             /* [n_slots] */
    struct toy_entry (*page)[DE_PAGE]; /* [n_pages] */
};
static bool toy_ignores_cuts;
static uint32_t script[4096]; /* where the model is sure of its next token: by position, or 0 */
static delta_session *cancel_in_forward;
static uint32_t n_forwards, n_rows_last;

struct de_backend {
    const char *name;
};
static const de_backend fake_backend = { "cpu" };

const de_backend *de_backend_find(const char *name)
{
    return strcmp(name, "cuda") == 0 ? NULL : &fake_backend;
}
const char *de_backend_name(const de_backend *b)
{
    return b->name;
}
uint32_t de_backend_rows(const de_backend *b)
{
    (void)b;
    return 512;
}
uint64_t de_backend_memory(const de_backend *b)
{
    (void)b;
    return UINT64_C(64) << 30;
}
void *de_backend_host_alloc(const de_backend *b, size_t bytes)
{
    (void)b;
    return calloc(1, bytes);
}
void de_backend_host_free(const de_backend *b, void *p)
{
    (void)b;
    free(p);
}
int de_model_plan(const de_shape *shape, const de_binding *b, const de_model_options *o,
                  de_memory_plan *ret_plan, delta_error *err)
{
    (void)shape, (void)b, (void)err;
    *ret_plan = (de_memory_plan){ 1000, (uint64_t)o->n_pages * 65536, 1000, 1000 };
    return 0;
}
int de_model_open(const de_weights *w, const de_shape *shape, const de_binding *b,
                  const de_model_options *o, de_model **ret_m, delta_error *err)
{
    (void)w, (void)shape, (void)b, (void)err;
    *ret_m = calloc(1, sizeof **ret_m);
    (*ret_m)->o = *o;
    (*ret_m)->slot = calloc(o->n_slots, sizeof *(*ret_m)->slot);
    (*ret_m)->page = calloc(o->n_pages, sizeof *(*ret_m)->page);
    return 0;
}
void de_model_free(de_model *m)
{
    if (m) {
        free(m->slot);
        free(m->page);
    }
    free(m);
}
void de_model_slot_clear(de_model *m, uint32_t slot)
{
    m->slot[slot] = (struct toy_slot){ .hash = 1, .chain = 1 };
}
int de_model_wait(de_model *m, delta_error *err)
{
    (void)m, (void)err;
    return 0;
}
size_t de_model_slot_bytes(const de_model *m)
{
    return sizeof *m->slot * 100;
}
size_t de_model_page_bytes(const de_model *m)
{
    return sizeof *m->page;
}
int de_model_slot_copy(de_model *m, uint32_t from, uint32_t to, delta_error *err)
{
    if (from == to || from >= m->o.n_slots || to >= m->o.n_slots)
        return delta_fail(err, DELTA_EINTERNAL, "slot %u to %u", from, to);
    m->slot[to] = m->slot[from];
    return 0;
}
int de_model_slot_save(de_model *m, uint32_t slot, void *dst, delta_error *err)
{
    (void)err;
    memcpy(dst, &m->slot[slot], sizeof *m->slot);
    return 0;
}
int de_model_slot_load(de_model *m, uint32_t slot, const void *src, delta_error *err)
{
    (void)err;
    memcpy(&m->slot[slot], src, sizeof *m->slot);
    return 0;
}
int de_model_page_save(de_model *m, uint32_t page, void *dst, delta_error *err)
{
    (void)err;
    memcpy(dst, m->page[page], sizeof *m->page);
    return 0;
}
int de_model_page_load(de_model *m, uint32_t page, const void *src, delta_error *err)
{
    (void)err;
    memcpy(m->page[page], src, sizeof *m->page);
    return 0;
}
int de_model_page_copy(de_model *m, uint32_t from, uint32_t to, delta_error *err)
{
    if (from == to || from >= m->o.n_pages || to >= m->o.n_pages)
        return delta_fail(err, DELTA_EINTERNAL, "page %u to %u", from, to);
    memcpy(m->page[to], m->page[from], sizeof *m->page);
    return 0;
}
static uint64_t mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * 0x9e3779b97f4a7c15u;
    return h ^ (h >> 29);
}
int de_forward(de_model *m, const de_batch *b, float *logits, const de_capture *c, delta_error *err)
{
    (void)c;
    bool page_written[4096] = { false };
    n_forwards++;
    n_rows_last = b->n_rows;
    if (cancel_in_forward)
        delta_session_cancel(cancel_in_forward);
    if (b->n_rows > m->o.max_rows || b->n_seqs > m->o.max_seqs || b->n_out > m->o.max_out)
        return delta_fail(err, DELTA_EINTERNAL, "batch too large");
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const de_batch_seq *s = &b->seqs[i];
        struct toy_slot *slot = &m->slot[s->slot];
        if (s->start != slot->n || s->n_rows == 0)
            return delta_fail(err, DELTA_EINTERNAL, "does not continue");
        for (uint32_t p = s->start / DE_PAGE; p < (s->start + s->n_rows + DE_PAGE - 1) / DE_PAGE;
             p++) {
            if (s->pages[p] >= m->o.n_pages || page_written[s->pages[p]])
                return delta_fail(err, DELTA_EINTERNAL, "page %u is not this session's alone",
                                  s->pages[p]);
            page_written[s->pages[p]] = true;
        }
        uint64_t chain = 1;
        for (uint32_t at = 0; at < s->start; at++) {
            const struct toy_entry *x = &m->page[s->pages[at / DE_PAGE]][at % DE_PAGE];
            chain = mix(chain, x->token);
            if (x->chain != chain)
                return delta_fail(err, DELTA_EINTERNAL, "page of %u is another's", at);
        }
        if (chain != slot->chain)
            return delta_fail(err, DELTA_EINTERNAL, "the pages are not the state's");
        uint32_t mark = 0;
        for (uint32_t k = 0; k < s->n_rows; k++) {
            const uint32_t tok = b->tokens[s->row + k];
            if (b->pos[s->row + k][0] != s->start + k)
                return delta_fail(err, DELTA_EINTERNAL, "position");
            if (tok == FAULT_TOKEN)
                return delta_fail(err, DELTA_EDEVICE, "the device is gone");
            slot->hash = mix(slot->hash, tok);
            slot->chain = mix(slot->chain, tok);
            slot->n++;
            m->page[s->pages[(s->start + k) / DE_PAGE]][(s->start + k) % DE_PAGE] =
                (struct toy_entry){ slot->chain, tok };
            if (mark < s->n_marks && s->marks[mark].end == slot->n)
                m->slot[s->marks[mark++].slot] = *slot;
        }
        if (mark != s->n_marks)
            return delta_fail(err, DELTA_EINTERNAL, "a mark outside of the rows");
        if (slot->n % DE_CHUNK && !toy_ignores_cuts)
            slot->hash = mix(slot->hash, 0xc07u); /* the cut */
        if (s->n_out) {
            float *l = logits + (size_t)s->first_out * VOCAB;
            for (uint32_t k = 0; k < VOCAB; k++)
                l[k] = (float)(mix(slot->hash, k) >> 40) * 0x1p-22f;
            if (slot->n < 4096 && script[slot->n])
                l[script[slot->n]] = 50;
            if (b->tokens[s->row + s->n_rows - 1] == NAN_TOKEN)
                l[17] = NAN;
        }
    }
    return 0;
}

/* ---- helpers ---- */

static delta_engine *open_engine(uint32_t sessions, uint64_t kv_tokens, uint32_t step_tokens)
{
    delta_engine_options o = { .model_dir = DEMO_MODEL_DIR,
                               .max_sessions = sessions,
                               .kv_tokens = kv_tokens,
                               .step_tokens = step_tokens };
    delta_engine *e = NULL;
    delta_error err = { 0 };
    if (delta_engine_open(&o, &e, &err) < 0) {
        printf("# %s\n", err.text);
        exit(1);
    }
    return e;
}

static void append_count(delta_session *s, uint32_t n, uint32_t salt)
{
    uint32_t ids[2000];
    for (uint32_t i = 0; i < n; i++)
        ids[i] = (salt * 31 + i * 7) % 250;
    CHECK_EQ(delta_session_append(s, ids, n, NULL), 0);
}

static void generate(delta_session *s, uint32_t max)
{
    CHECK_EQ(delta_session_generate(s, &greedy, &(delta_stopping){ .max_tokens = max }, NULL), 0);
}

/* The next tokens of a session that has n tokens, as the model is sure of them. */
static void say(uint32_t n, const uint32_t *ids, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        script[n + i] = ids[i];
}
static void say_text(uint32_t n, const char *text)
{
    for (uint32_t i = 0; text[i]; i++)
        script[n + i] = (uint8_t)text[i];
}

#endif
