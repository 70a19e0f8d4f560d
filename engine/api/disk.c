/* disk.c -- the third tier at work: which states go to the disk, how they come back, and saves. See
 * delta/cache.h; the folder itself is cache/store.h.
 *
 * Out: leaves and branches of the prefix tree that are idle, the shortest first, so that what they
 * share is written once. A session that rests on the device leaves a copy in the tree first. The node
 * is pinned while its pages and its state go through the buffer.
 *
 * In: a session that is not resident and of which the disk has DE_DISK_GAIN tokens more than the tree
 * waits. A slot and the pages that the tree lacks are taken, filled piece by piece and become a node,
 * from which the session goes on as from any other. One is fetched at a time, the others wait.
 *
 * A disk that is full or broken is told once, left alone for RETRY_NS and tried again.
 *
 * Threads    the engine's. All memory is allocated by delta_cache_open(). */
#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "api/internal.h"
#include "base/bits.h"
#include "base/hash64.h"
#include "cache/store.h"
#include "delta/cache.h"

enum {
    DE_DISK_GAIN = DE_CHUNK,
    BUSY_NS = 1000 * 1000,       /* between looks at a disk at work */
    LOOK_NS = 100 * 1000 * 1000, /* between looks for idle nodes */
    REFUSED_NS =
        1000 * 1000 * 1000, /* so long after somebody found no room none is begun to be written */
};
static const uint64_t RETRY_NS = UINT64_C(60) * 1000000000u;

typedef struct de_disk {
    delta_cache_options o;
    de_store *store;
    de_record_kind kind;
    uint8_t *buffers;       /* the writer's, the readers' */
    uint32_t *ids, *pages;  /* [ctx_max + 1], [ctx_max / DE_PAGE + 2]: scratch */
    uint64_t look_ns;       /* of the next look for idle nodes */
    bool is_broken;         /* the last write failed; that was told */
    de_prefix_node *writes; /* pinned */
    struct {
        bool is_on;                 /* it is written */
        const delta_session *waits; /* or NULL: whose is next, before what is idle */
        int result;                 /* 1: not known yet */
        uint32_t tokens;
        uint64_t bytes;
        delta_error err;
    } save;
    struct {
        bool is_on;
        delta_session *whom;  /* or NULL: gone */
        de_prefix_node *base; /* pinned, or NULL: from the beginning */
        uint64_t owner;
        uint32_t n;                /* tokens */
        uint32_t *ids, *pages;     /* as above */
        uint32_t first, end, slot; /* pages [first, end) and the slot are taken */
    } in;
} de_disk;

__attribute__((format(printf, 3, 4))) static void
note(const de_disk *d, enum delta_note_level level, const char *format, ...)
{
    if (!d->o.on_note)
        return;
    char text[512];
    va_list ap;
    va_start(ap, format);
    (void)vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    d->o.on_note(d->o.arg, level, text);
}

/* ---- what the states are of */

static uint64_t model_of(const delta_engine *e)
{
    uint64_t h = de_hash64(1, e->info.backend, strlen(e->info.backend));
    const uint32_t n = (uint32_t)de_weights_count(e->weights);
    uint32_t shards = 0;
    for (uint32_t i = 0; i < n; i++) {
        const de_tensor *t = de_weights_at(e->weights, i);
        h = de_hash64(h, t->name, strlen(t->name));
        h = de_hash64(h, &t->offset, sizeof t->offset);
        shards = t->shard >= shards ? t->shard + 1 : shards;
    }
    for (uint32_t i = 0; i < shards; i++) {
        struct stat st = { 0 };
        (void)stat(de_weights_shard_path(e->weights, i), &st);
        const int64_t at[] = { st.st_size, st.st_mtim.tv_sec, st.st_mtim.tv_nsec };
        h = de_hash64(h, at, sizeof at);
    }
    for (uint32_t id = 0; id < e->info.n_tokens; id++) {
        size_t len = 0;
        const uint8_t *bytes = delta_token_bytes(e->tokenizer, id, &len);
        h = de_hash64(h + len, bytes, len);
    }
    return h;
}

static de_record_kind kind_of(const delta_engine *e)
{
    de_record_kind k;
    memset(&k, 0, sizeof k);
    k.model = model_of(e);
    k.slot_bytes = e->prefix.slot_bytes;
    k.page_bytes = e->prefix.page_bytes;
    k.page_tokens = DE_PAGE;
    (void)snprintf(k.name, sizeof k.name, "%s on %s", e->info.model_name, e->info.backend);
    return k;
}

/* ---- out */

/* The state, or pages [page, + n) of the whole prefix, to the buffer. */
static int copy_out(delta_engine *e, const de_prefix_node *x, uint32_t page, uint32_t n,
                    uint8_t *to)
{
    const size_t bytes = (size_t)e->prefix.page_bytes;
    int r = de_model_wait(e->model, &e->fault); /* the host's tier is read here */
    if (r < 0)
        return r;
    if (n == 0 && x->slot & DE_ON_HOST)
        memcpy(to, de_host_slot(e, x->slot), (size_t)e->prefix.slot_bytes);
    else if (n == 0)
        r = de_model_slot_save(e->model, x->slot, to, &e->fault);
    if (n)
        de_prefix_pages(&e->prefix, x, e->disk->pages);
    for (uint32_t i = 0; r == 0 && i < n; i++) {
        const uint32_t p = e->disk->pages[page + i];
        if (p & DE_ON_HOST)
            memcpy(to + i * bytes, de_host_page(e, p), bytes);
        else
            r = de_model_page_save(e->model, p, to + i * bytes, &e->fault);
    }
    return r == 0 ? de_model_wait(e->model, &e->fault) : r; /* the writer reads the buffer next */
}

static void end_write(delta_engine *e, uint64_t now)
{
    de_disk *d = e->disk;
    delta_error err = { 0 };
    uint64_t id = 0;
    int r = de_store_write_end(d->store, &id, &err);
    if (d->save.is_on) {
        d->save.result = r;
        d->save.err = err;
        d->save.is_on = false;
    } else if (r == 0) {
        d->writes->record = id;
        if (d->is_broken)
            note(d, DELTA_NOTE_INFO, "the cache goes to the disk again");
        d->is_broken = false;
    } else if (r != DELTA_ECANCELLED) {
        if (!d->is_broken)
            note(d, DELTA_NOTE_WARNING,
                 "the cache does not go to the disk: %s; what is there stays", err.text);
        d->is_broken = true;
        d->look_ns = now + RETRY_NS;
    }
    de_prefix_unpin(&e->prefix, d->writes);
    d->writes = NULL;
}

/* Begins with a node that is idle since before_ns. */
static void begin_write(delta_engine *e, uint64_t before_ns)
{
    de_disk *d = e->disk;
    uint64_t owner = 0, bytes;
    uint32_t first;
    de_prefix_node *x;
    while ((x = de_prefix_idle(&e->prefix, before_ns, &owner))) {
        de_prefix_ids(x, d->ids);
        x->record = de_store_record(d->store, owner, d->ids, x->end);
        if (x->record)
            continue;
        const int r =
            de_store_write_begin(d->store, owner, d->ids, x->end, NULL, &first, &bytes, NULL);
        if (r == DELTA_ELIMIT) {
            x->record = DE_NO_RECORD;
            continue;
        }
        if (r == 0) {
            d->writes = x;
            x->pins++;
        }
        return;
    }
}

/* Sessions that rest on the device leave a copy. */
static void keep_resting(delta_engine *e, uint64_t before_ns)
{
    for (uint32_t i = 0; i < e->info.max_sessions; i++) {
        delta_session *s = e->by_seat[i];
        if (!s || de_session_has_work(s) || s->active_ns >= before_ns || s->rested == s->computed)
            continue;
        s->rested = s->computed;
        (void)de_session_keep(s, true);
    }
}

static void work_out(delta_engine *e, uint64_t now)
{
    de_disk *d = e->disk;
    const enum de_store_phase phase = de_store_write_phase(d->store);
    if (phase == DE_STORE_DONE || phase == DE_STORE_FAILED) {
        end_write(e, now);
    } else if (phase == DE_STORE_YOURS) {
        uint32_t page, n;
        de_store_write_wants(d->store, &page, &n);
        if (copy_out(e, d->writes, page, n, d->buffers) == 0)
            de_store_write_put(d->store);
        return;
    } else if (phase == DE_STORE_BUSY) {
        return;
    }
    if (now < d->look_ns || d->save.waits || (e->refused_ns && now < e->refused_ns + REFUSED_NS))
        return; /* what is written could not make room */
    const uint64_t before = now > d->o.idle_ns ? now - d->o.idle_ns : 0;
    keep_resting(e, before);
    begin_write(e, before);
    if (!d->writes)
        d->look_ns = now + LOOK_NS;
}

uint64_t delta_save_state_at(uint64_t text_bytes)
{
    return de_align_up(text_bytes, DE_RECORD_ALIGN);
}

int delta_cache_save(delta_session *s, const delta_save *save, delta_error *err)
{
    delta_engine *e = s->engine;
    de_disk *d = e->disk;
    if (!d)
        return delta_fail(err, DELTA_ESTATE, "there is no cache on disk");
    if (e->fault.code)
        return delta_fail(err, e->fault.code, "%s", e->fault.text);
    d->save.waits = s;
    if (!de_session_is_resident(s) && delta_session_fetch(s) == 1)
        return 1;
    if (de_store_write_phase(d->store) != DE_STORE_NONE)
        return 1;
    d->save.waits = NULL;
    if (de_session_is_resident(s) && de_session_has_work(s))
        return delta_fail(err, DELTA_ESTATE, "the session is at work");
    if (de_session_is_resident(s))
        (void)de_session_keep(s, true);
    de_prefix_node *x =
        de_session_uses_cache(s) ? de_prefix_pin(&e->prefix, s->owner, s->tokens, s->n) : NULL;
    if (!x || x->is_bad) {
        if (x)
            de_prefix_unpin(&e->prefix, x);
        return delta_fail(err, DELTA_ENOTFOUND, "nothing of the session is computed");
    }
    uint32_t first;
    const de_store_save to = { save->path, save->text, save->text_bytes, save->max_bytes };
    int r = de_store_write_begin(d->store, s->owner, s->tokens, x->end, &to, &first, &d->save.bytes,
                                 err);
    if (r < 0) {
        de_prefix_unpin(&e->prefix, x);
        return r;
    }
    d->writes = x;
    d->save.is_on = true;
    d->save.result = 1;
    d->save.tokens = x->end;
    return 0;
}

int delta_cache_saved(delta_engine *e, uint64_t *ret_bytes, uint32_t *ret_tokens, delta_error *err)
{
    const de_disk *d = e->disk;
    assert(d);
    if (d->save.result == 0) {
        *ret_bytes = d->save.bytes;
        *ret_tokens = d->save.tokens;
    } else if (d->save.result < 0 && err) {
        *err = d->save.err;
    }
    return d->save.result;
}

int delta_cache_check(const delta_engine *e, const char *path, uint64_t at, uint32_t *ret_tokens,
                      delta_error *err)
{
    return e->disk ? de_store_check(&e->disk->kind, path, at, ret_tokens, err)
                   : delta_fail(err, DELTA_ESTATE, "there is no cache on disk");
}

int delta_cache_adopt(delta_engine *e, const char *path, uint64_t at, uint64_t owner,
                      delta_error *err)
{
    return e->disk ? de_store_adopt(e->disk->store, path, at, owner, err)
                   : delta_fail(err, DELTA_ESTATE, "there is no cache on disk");
}

/* ---- in */

static uint32_t pages_until(uint32_t tokens)
{
    return (uint32_t)de_ceil_div(tokens, DE_PAGE);
}

static void end_fetch(delta_engine *e)
{
    de_disk *d = e->disk;
    delta_error err = { 0 };
    const int r = de_store_read_end(d->store, &err);
    bool is_kept = false;
    if (r == 0) {
        is_kept =
            de_prefix_add(&e->prefix, d->in.owner, d->in.ids, d->in.n, d->in.pages, d->in.slot);
        de_prefix_node *x =
            is_kept ? de_prefix_pin(&e->prefix, d->in.owner, d->in.ids, d->in.n) : NULL;
        if (x) {
            x->record = de_store_record(d->store, d->in.owner, d->in.ids, d->in.n);
            de_prefix_unpin(&e->prefix, x);
        }
    } else if (r != DELTA_ECANCELLED) {
        note(d, DELTA_NOTE_WARNING, "a state is lost: %s; it is computed again", err.text);
    }
    if (!is_kept)
        de_gdn_slots_give(&e->slots, d->in.slot);
    de_kv_pages_give(&e->kv, d->in.pages + d->in.first, d->in.end - d->in.first);
    if (d->in.base)
        de_prefix_unpin(&e->prefix, d->in.base);
    if (d->in.whom)
        d->in.whom->fetched = d->in.whom->n; /* once is enough, however it ended */
    d->in.whom = NULL;
    d->in.is_on = false;
}

/* 1; 0: it has gone; DELTA_EBUSY. */
static int begin_fetch(delta_engine *e, delta_session *s, uint64_t record, uint32_t n)
{
    de_disk *d = e->disk;
    de_prefix_node *base = de_prefix_pin(&e->prefix, s->owner, s->tokens, n);
    const uint32_t first = base ? base->end / DE_PAGE : 0, end = pages_until(n);
    int r = de_engine_take_slot(e, &d->in.slot) ? 1 : DELTA_EBUSY;
    if (r == 1 && de_engine_take_pages(e, end - first, d->in.pages + first, NULL) < 0) {
        de_gdn_slots_give(&e->slots, d->in.slot);
        r = DELTA_EBUSY;
    }
    if (r == 1 && de_store_read_begin(d->store, record, first, NULL) < 0) {
        de_gdn_slots_give(&e->slots, d->in.slot);
        de_kv_pages_give(&e->kv, d->in.pages + first, end - first);
        r = 0;
    }
    if (r != 1) {
        if (base)
            de_prefix_unpin(&e->prefix, base);
        return r;
    }
    d->in.is_on = true;
    d->in.whom = s;
    d->in.base = base;
    d->in.owner = s->owner;
    d->in.n = n;
    d->in.first = first;
    d->in.end = end;
    memcpy(d->in.ids, s->tokens, n * sizeof *s->tokens);
    return 1;
}

int de_disk_fetch(delta_engine *e, delta_session *s, uint32_t most)
{
    const de_disk *d = e->disk;
    uint64_t record = 0;
    if (!d || e->fault.code)
        return 0;
    if (d->in.is_on && d->in.whom == s)
        return 1;
    const uint32_t has = de_prefix_reach(&e->prefix, s->owner, s->tokens, most),
                   n = de_store_find(d->store, s->owner, s->tokens, s->n, most, &record);
    if (n < has + DE_DISK_GAIN)
        return 0;
    return d->in.is_on ? 1 : begin_fetch(e, s, record, n);
}

static void work_in(delta_engine *e)
{
    de_disk *d = e->disk;
    enum de_store_phase phase;
    int r = 0;
    for (int k = 0; (phase = de_store_read_phase(d->store)) == DE_STORE_YOURS &&
                    k < DE_STORE_READERS && r == 0;
         k++) {
        uint32_t page, n;
        const uint8_t *from = de_store_read_has(d->store, &page, &n);
        r = n ? 0 : de_model_slot_load(e->model, d->in.slot, from, &e->fault);
        for (uint32_t i = 0; r == 0 && i < n; i++)
            r = de_model_page_load(e->model, d->in.pages[page + i],
                                   from + i * (size_t)e->prefix.page_bytes, &e->fault);
        if (r == 0)
            r = de_model_wait(e->model, &e->fault); /* the reader writes the buffer next */
        if (r == 0)
            de_store_read_next(d->store);
    }
    if (phase == DE_STORE_DONE || phase == DE_STORE_FAILED)
        end_fetch(e);
}

/* ---- from outside */

void de_disk_left(delta_engine *e, const delta_session *s)
{
    if (e->disk && e->disk->in.whom == s)
        e->disk->in.whom = NULL;
    if (e->disk && e->disk->save.waits == s)
        e->disk->save.waits = NULL;
}

void de_disk_touch(delta_engine *e, de_prefix_node *node)
{
    if (e->disk && node && node->record && node->record != DE_NO_RECORD &&
        !de_store_touch(e->disk->store, node->record))
        node->record = 0; /* it was given up there */
}

void de_disk_forget(delta_engine *e, uint64_t owner, const uint32_t *ids, uint32_t n, uint32_t from)
{
    de_disk *d = e->disk;
    if (!d)
        return;
    if (d->in.is_on)
        end_fetch(e); /* it may go on from a bad one; if not, it is asked for again */
    if (d->writes)
        end_write(e, 0);
    de_store_forget(d->store, owner, ids, n, from);
}

void de_disk_stats(const delta_engine *e, delta_engine_stats *s)
{
    if (!e->disk)
        return;
    de_store_stats x;
    de_store_stats_get(e->disk->store, &x);
    s->disk_checkpoints = x.records;
    s->disk_bytes = x.bytes;
    s->disk_bytes_max = e->disk->o.max_bytes;
    s->disk_writes = x.writes;
    s->disk_reads = x.reads;
    s->disk_evictions = x.evictions;
    s->disk_is_writing = e->disk->writes != NULL;
    s->disk_is_reading = e->disk->in.is_on;
}

int delta_cache_work(delta_engine *e, uint64_t *ret_again_ns, delta_error *err)
{
    de_disk *d = e->disk;
    *ret_again_ns = UINT64_MAX;
    if (!d)
        return 0;
    const uint64_t now = de_now_ns();
    const de_prefix_node *writes = d->writes;
    const bool is_in = d->in.is_on;
    e->prefix.now_ns = now;
    if (!e->fault.code)
        work_in(e);
    if (!e->fault.code)
        work_out(e, now);
    if (e->fault.code)
        return delta_fail(err, e->fault.code, "%s", e->fault.text);
    *ret_again_ns = d->in.is_on || d->writes ? BUSY_NS : LOOK_NS;
    return (writes && d->writes != writes) || (is_in && !d->in.is_on);
}

void delta_cache_flush(delta_engine *e)
{
    de_disk *d = e->disk;
    if (!d || e->fault.code)
        return;
    const uint64_t start = de_now_ns(), before = d->o.idle_ns;
    de_store_stats x;
    de_store_stats_get(d->store, &x);
    const uint64_t writes = x.writes;
    if (d->in.is_on)
        end_fetch(e);
    d->o.idle_ns = 0;
    d->look_ns = 0;
    d->is_broken = false;
    d->save.waits = NULL;
    do {
        work_out(e, de_now_ns() + 1);
        if (de_store_write_phase(d->store) == DE_STORE_BUSY)
            (void)nanosleep(&(struct timespec){ .tv_nsec = BUSY_NS / 10 }, NULL);
    } while (d->writes && !d->is_broken && !e->fault.code);
    d->o.idle_ns = before;
    de_store_stats_get(d->store, &x);
    note(d, DELTA_NOTE_INFO, "%u checkpoints kept in %s, %llu of them written in %.1f s", x.records,
         d->o.folder, (unsigned long long)(x.writes - writes),
         (double)(de_now_ns() - start) * 1e-9);
}

int delta_cache_open(delta_engine *e, const delta_cache_options *o, delta_error *err)
{
    if (!e->has_cache)
        return 0;
    assert(!e->disk);
    de_disk *d = calloc(1, sizeof *d);
    if (!d)
        return delta_fail(err, DELTA_ENOMEM, "%s: no memory", o->folder);
    e->disk = d;
    d->kind = kind_of(e);
    const de_record_kind kind = d->kind;
    const size_t buffer = de_store_buffer_bytes(&kind), n = e->info.ctx_max + 1u,
                 n_pages = n / DE_PAGE + 2;
    d->o = *o;
    d->o.folder = strdup(o->folder);
    d->buffers = de_backend_host_alloc(e->backend, (1 + DE_STORE_READERS) * buffer);
    d->ids = malloc(n * sizeof *d->ids);
    d->pages = malloc(n_pages * sizeof *d->pages);
    d->in.ids = malloc(n * sizeof *d->ids);
    d->in.pages = malloc(n_pages * sizeof *d->pages);
    de_store_found found = { 0 };
    int r = 0;
    if (!d->o.folder || !d->buffers || !d->ids || !d->pages || !d->in.ids || !d->in.pages)
        r = delta_fail(err, DELTA_ENOMEM, "%s: no memory", o->folder);
    if (r == 0)
        r = de_store_open(&(de_store_options){ .folder = d->o.folder,
                                               .max_bytes = o->max_bytes,
                                               .kind = kind,
                                               .write_buffer = d->buffers,
                                               .read_buffers = d->buffers + buffer },
                          &d->store, &found, err);
    if (r < 0) {
        de_disk_free(e);
        return r;
    }
    de_store_stats x;
    de_store_stats_get(d->store, &x);
    if (found.torn)
        note(d, DELTA_NOTE_INFO, "%s: a write that was cut off is taken away", d->o.folder);
    if (found.damaged)
        note(d, DELTA_NOTE_WARNING, "%u kept states are damaged and taken away; one was %s",
             found.damaged, found.text);
    if (x.foreign)
        note(d, DELTA_NOTE_INFO, "%s: %u kept states are of another model or backend than %s",
             d->o.folder, x.foreign, kind.name);
    note(d, DELTA_NOTE_INFO, "%u checkpoints found in %s, %.3f GiB", x.records, d->o.folder,
         (double)x.bytes / 0x1p30);
    e->prefix.now_ns = de_now_ns();
    return 0;
}

void de_disk_free(delta_engine *e)
{
    de_disk *d = e->disk;
    if (!d)
        return;
    de_store_close(d->store);
    free((void *)(uintptr_t)d->o.folder);
    if (d->buffers)
        de_backend_host_free(e->backend, d->buffers);
    free(d->ids);
    free(d->pages);
    free(d->in.ids);
    free(d->in.pages);
    free(d);
    e->disk = NULL;
}
