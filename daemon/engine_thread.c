/* engine_thread.c -- see engine_thread.h.
 *
 * The thread: drain the mailbox, try what waits, step, tell; with nothing to do it sleeps in the
 * mailbox for at most a second, so that the heartbeat rises. After a device fault it goes on
 * answering, with that error, until it is told to end. */
#include "daemon/engine_thread.h"

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/bits.h"
#include "base/clock.h"
#include "base/file.h"
#include "daemon/line.h"
#include "daemon/log.h"

enum {
    WISH_RUN = 1,
    WISH_CANCEL = 2,
    WISH_PAUSE = 4,
    WISH_RESUME = 8,
    WISH_FREE = 16,
    WISH_FORK = 32,
    WISH_PIN = 64,
    WISH_UNPIN = 128,
    WISH_SAVE = 256,
};
enum { IDLE_MS = 1000, SAVE_NS = 1000 * 1000 };

struct dd_timeline {
    dd_mail mail; /* first */
    dd_engine *engine;
    bool keep;
    uint64_t owner;
    dd_timeline *from;   /* WISH_FORK: of which this is to be a copy */
    atomic_uint n_forks; /* copies of this that are to be made yet; freed is it after them */
    atomic_bool is_parked;
    dd_run run;      /* written by the loop while no run is posted, read by the engine thread */
    delta_save save; /* of the save that is wished, written by the loop before that */
    uint64_t save_id;
    /* engine thread only */
    delta_session *session;
    bool has_save; /* it waits to be begun */
    bool has_appended, is_freed, is_pinned;
    dd_timeline *prev, *next; /* of all that have a session or wait */
    dd_place place;           /* in line, if it waits */
    uint64_t ended_ns;        /* its last run */
    bool is_listed, is_waiting, is_running, is_paused;
    bool is_preempted; /* its run waits in line for the second time */
    bool wants_pause;  /* for when it runs again */
    bool is_fetching;  /* its run waits for the disk */
    bool is_cancelled; /* its end comes with the next step: it must not be paused before that */
};

typedef struct batch {
    dd_batch link; /* first */
    uint32_t n, cap;
    dd_note *notes;
    size_t len, size;
    char *bytes; /* what the notes point to, as offsets + 1 until it is sent */
} batch;

struct dd_engine {
    uv_async_t async;
    dd_mailbox box;
    pthread_t thread;
    void (*on_note)(void *arg, const dd_note *n);
    void *arg;
    delta_engine_options options;
    atomic_ullong heartbeat;
    pthread_mutex_t stats_lock; /* guards stats */
    delta_engine_stats stats;
    delta_engine *engine; /* written before READY is sent */
    /* engine thread only */
    batch *out;
    dd_timeline *all;
    dd_line waiting;
    uint32_t n_running, n_paused; /* of them */
    bool has_room_changed;
    uint32_t n_fetching, n_saves; /* that wait to be begun */
    uint64_t n_preemptions;
    uint32_t answer_tokens; /* that an answer gets room for at a time */
    uint64_t saving;        /* the id of the one that is written; 0: none */
    char *cache_folder;     /* of the cache on disk, or NULL */
    uint64_t cache_bytes, cache_idle_ns;
    delta_error fault;
    uint64_t told_ns;
};

/* ---- telling: notes gather in a batch, and go with the step that made them */

/* Memory for what must not be lost: the engine waits until there is some. */
static void *must_realloc(void *p, size_t size)
{
    void *q;
    while (!(q = realloc(p, size)))
        (void)nanosleep(&(struct timespec){ .tv_nsec = 10 * 1000 * 1000 }, NULL);
    return q;
}

static size_t keep_bytes(batch *b, const void *data, size_t len)
{
    size_t at = (b->len + 15) & ~(size_t)15;
    if (at + len + 1 > b->size) {
        b->size = (at + len + 1) * 2;
        b->bytes = must_realloc(b->bytes, b->size);
    }
    if (len)
        memcpy(b->bytes + at, data, len);
    b->bytes[at + len] = '\0';
    b->len = at + len + 1;
    return at;
}

static void tell(dd_engine *e, const dd_note *n)
{
    batch *b = e->out;
    if (!b) {
        b = e->out = must_realloc(NULL, sizeof *b);
        memset(b, 0, sizeof *b);
    }
    if (b->n == b->cap) {
        b->cap = b->cap ? b->cap * 2 : 16;
        b->notes = must_realloc(b->notes, b->cap * sizeof *b->notes);
    }
    dd_note *to = &b->notes[b->n++];
    *to = *n;
    /* Offsets now, pointers when the bytes have stopped moving. */
    if (n->text)
        to->text = (const char *)(uintptr_t)(keep_bytes(b, n->text, n->len) + 1);
    if (n->n_top)
        to->top = (const void *)(uintptr_t)(keep_bytes(b, n->top, n->n_top * sizeof *n->top) + 1);
}

static void send_out(dd_engine *e)
{
    batch *b = e->out;
    if (!b)
        return;
    for (uint32_t i = 0; i < b->n; i++) {
        if (b->notes[i].text)
            b->notes[i].text = b->bytes + (uintptr_t)b->notes[i].text - 1;
        if (b->notes[i].n_top)
            b->notes[i].top = (const void *)(b->bytes + (uintptr_t)b->notes[i].top - 1);
    }
    e->out = NULL;
    dd_mailbox_send(&e->box, &b->link);
}

static void tell_text(dd_engine *e, enum dd_note_kind kind, const char *text, double progress)
{
    tell(e, &(dd_note){ .kind = kind, .text = text, .len = strlen(text), .progress = progress });
}

/* ---- timelines */

static void list(dd_engine *e, dd_timeline *t)
{
    if (t->is_listed)
        return;
    t->prev = NULL;
    t->next = e->all;
    if (e->all)
        e->all->prev = t;
    e->all = t;
    t->is_listed = true;
}

static void unlist(dd_engine *e, dd_timeline *t)
{
    if (!t->is_listed)
        return;
    if (t->prev)
        t->prev->next = t->next;
    else
        e->all = t->next;
    if (t->next)
        t->next->prev = t->prev;
    t->is_listed = false;
}

static void tell_saved(dd_engine *e, uint64_t id, const delta_error *err, uint64_t bytes,
                       uint32_t tokens)
{
    tell(e, &(dd_note){ .kind = DD_NOTE_SAVED,
                        .run = id,
                        .error = err ? err->code : 0,
                        .text = err ? err->text : NULL,
                        .len = err ? strlen(err->text) : 0,
                        .bytes = bytes,
                        .total = tokens });
}

/* A save that was not begun yet ends so. */
static void end_save(dd_engine *e, dd_timeline *t, int code, const char *why)
{
    delta_error err = { 0 };
    if (!t->has_save)
        return;
    t->has_save = false;
    e->n_saves--;
    err.code = delta_fail(&err, code, "%s", why);
    tell_saved(e, t->save_id, &err, 0, 0);
}

static void drop_session(dd_engine *e, dd_timeline *t)
{
    end_save(e, t, DELTA_ECANCELLED, "the session is gone");
    if (t->session) {
        delta_session_free(t->session);
        t->session = NULL;
        e->has_room_changed = true;
    }
    unlist(e, t);
}

static dd_timeline *timeline_of(dd_place *p)
{
    return p ? (dd_timeline *)((char *)p - offsetof(dd_timeline, place)) : NULL;
}

static dd_timeline *first_waiting(const dd_engine *e)
{
    return timeline_of(e->waiting.first);
}

static void unwait(dd_engine *e, dd_timeline *t)
{
    dd_line_remove(&e->waiting, &t->place);
    t->is_waiting = false;
}

/* Its rank is set. One that has waited before keeps its place. */
static void wait_for_room(dd_engine *e, dd_timeline *t)
{
    t->is_waiting = true;
    uint32_t before = dd_line_add(&e->waiting, &t->place);
    tell(e, &(dd_note){ .kind = DD_NOTE_QUEUED, .run = t->run.id, .n = before });
}

static void pause_run(dd_engine *e, dd_timeline *t, bool paused)
{
    if (t->is_paused == paused)
        return;
    t->is_paused = paused;
    e->n_paused += paused ? 1 : -1;
    delta_session_pause(t->session, paused);
}

static void stop_fetching(dd_engine *e, dd_timeline *t)
{
    t->is_fetching = false;
    e->n_fetching--;
}

/* The run's last note. The loop may free the timeline as soon as it is sent. */
static void end_run(dd_engine *e, dd_timeline *t, dd_note n)
{
    n.kind = DD_NOTE_FINISHED;
    n.run = t->run.id;
    if (t->session) {
        size_t len = 0;
        /* A turn that did not happen leaves no trace. */
        if (t->keep && t->has_appended && n.n_generated == 0 &&
            (n.finish == DELTA_FINISH_CANCELLED || n.finish == DELTA_FINISH_ERROR))
            (void)delta_session_rewind(t->session, t->run.n_before, NULL);
        const uint32_t *ids = delta_session_tokens(t->session, &len);
        delta_session_reuse(t->session, &n.n_cached, &n.n_shared);
        n.n_timeline = (uint32_t)len;
        n.last_token = len ? ids[len - 1] : UINT32_MAX;
    }
    if (t->is_running) {
        pause_run(e, t, false);
        e->n_running--;
    }
    t->is_running = t->is_preempted = false;
    t->has_appended = false;
    t->ended_ns = de_now_ns();
    e->has_room_changed = true;
    if (!t->keep)
        drop_session(e, t);
    tell(e, &n);
}

static void end_with_error(dd_engine *e, dd_timeline *t, const delta_error *err)
{
    end_run(e, t,
            (dd_note){ .finish = DELTA_FINISH_ERROR,
                       .error = err->code,
                       .text = err->text,
                       .len = strlen(err->text) });
}

/* The run's tokens into the timeline, once, however often it is tried to start. */
static int append(dd_timeline *t, delta_error *err)
{
    size_t n = 0;
    (void)delta_session_tokens(t->session, &n);
    if (n < t->run.n_before)
        return delta_fail(err, DELTA_ESTATE, "the session's state was lost: try again");
    int r = delta_session_rewind(t->session, t->run.n_before, err);
    if (r == 0)
        r = delta_session_append(t->session, t->run.ids, t->run.n_ids, err);
    for (size_t i = 0; r == 0 && i < t->run.n_marks; i++)
        delta_session_mark(t->session, t->run.n_before + t->run.marks[i]);
    t->has_appended = r == 0;
    return r;
}

/* One that runs in the background gives up its place; what it has computed is in the cache. */
static bool stop_background(dd_engine *e)
{
    dd_timeline *t = e->all;
    while (t && !(t->is_running && t->run.is_background))
        t = t->next;
    if (t)
        end_run(e, t, (dd_note){ .finish = DELTA_FINISH_CANCELLED });
    return t != NULL;
}

/* Of those that rest the one that did nothing for longest leaves the device, pinned ones last. */
static bool park_resting(dd_engine *e)
{
    dd_timeline *found = NULL;
    for (dd_timeline *t = e->all; t; t = t->next) {
        if (!t->keep || t->is_running || t->is_waiting || t->is_fetching || !t->session ||
            !delta_session_resident(t->session))
            continue;
        if (!found ||
            (t->is_pinned != found->is_pinned ? found->is_pinned : t->ended_ns < found->ended_ns))
            found = t;
    }
    if (found) {
        delta_session_park(found->session);
        atomic_store(&found->is_parked, true);
    }
    return found != NULL;
}

/* Leaves the device and waits where it was in line. */
static void preempt(dd_engine *e, dd_timeline *t)
{
    t->wants_pause = t->is_paused;
    pause_run(e, t, false);
    t->is_running = false;
    t->is_preempted = true;
    e->n_running--;
    e->n_preemptions++;
    delta_session_park(t->session);
    atomic_store(&t->is_parked, true);
    e->has_room_changed = true;
    wait_for_room(e, t);
}

/* Whether a is given up before b. */
static bool goes_before(const dd_timeline *a, const dd_timeline *b)
{
    return a->run.priority != b->run.priority ? a->run.priority < b->run.priority
                                              : a->place.rank > b->place.rank;
}

/* A run makes room for t: one of lower priority or, where t runs and grows, of the same and behind it. */
static bool preempt_for(dd_engine *e, const dd_timeline *t)
{
    dd_timeline *found = NULL;
    for (dd_timeline *x = e->all; x; x = x->next)
        if (x->is_running && !x->is_cancelled && x != t &&
            (t->is_running ? goes_before(x, t) : x->run.priority < t->run.priority) &&
            (!found || goes_before(x, found)))
            found = x;
    if (found)
        preempt(e, found);
    return found != NULL;
}

/* Somebody gave up room for t. */
static bool free_some(dd_engine *e, const dd_timeline *t)
{
    return !t->run.is_background && (stop_background(e) || park_resting(e) || preempt_for(e, t));
}

/* Room for `tokens` of t. DELTA_EBUSY: nobody is left who would give some up for it. */
static int make_room(dd_engine *e, dd_timeline *t, uint32_t tokens, delta_error *err)
{
    int r;
    while ((r = delta_session_reserve(t->session, tokens, err)) == DELTA_EBUSY)
        if (!free_some(e, t))
            break;
    return r;
}

/* What the disk has of it. 1: it is on its way. 0: there is nothing, or never will be room. DELTA_EBUSY. */
static int fetch(dd_engine *e, dd_timeline *t)
{
    int r = 0;
    while (!t->run.is_background && (r = delta_session_fetch(t->session)) == DELTA_EBUSY)
        if (!free_some(e, t))
            return e->n_running ? r : 0;
    return r;
}

/* A preempted run's generation ends where it is; what it would say of that is not told. */
static void abandon(dd_timeline *t)
{
    const delta_event *events;
    size_t n;
    if (t->is_preempted)
        delta_session_abort(t->session, &events, &n);
}

/* A session with the run's tokens. */
static int prepare(dd_engine *e, dd_timeline *t, delta_error *err)
{
    int r = 0;
    if (!t->session)
        r = delta_session_new(e->engine, t->owner, t, &t->session, err);
    if (t->session) {
        list(e, t);
        delta_session_set_pinned(t->session, t->is_pinned);
    }
    if (r == 0 && !t->has_appended)
        r = append(t, err);
    return r;
}

/* Tokens that a run has room for when it begins, or goes on: not yet for all of a long answer. */
static uint32_t room_to_begin(const dd_engine *e, const dd_timeline *t)
{
    size_t n = 0;
    (void)delta_session_tokens(t->session, &n);
    const uint64_t want = n + e->answer_tokens;
    const uint32_t room = want < t->run.ctx_tokens ? (uint32_t)want : t->run.ctx_tokens;
    return room > t->run.reserve_tokens ? room : t->run.reserve_tokens;
}

/* false: no room now. true: it runs, or it has ended, or its state is on the way from the disk. */
static bool start(dd_engine *e, dd_timeline *t)
{
    delta_error err = { 0 };
    if (e->fault.code) {
        end_with_error(e, t, &e->fault);
        return true;
    }
    int r = prepare(e, t, &err);
    if (r == 0) {
        delta_session_set_background(t->session, t->run.is_background);
        delta_session_set_limit(t->session, t->run.ctx_tokens);
        r = fetch(e, t);
    }
    if (r == 1) {
        t->is_fetching = true;
        e->n_fetching++;
        return true;
    }
    if (r == 0)
        r = make_room(e, t, room_to_begin(e, t), &err);
    if (r == DELTA_EBUSY) {
        if (t->run.is_background)
            end_run(e, t, (dd_note){ .finish = DELTA_FINISH_CANCELLED });
        return t->run.is_background;
    }
    const bool begins = t->run.generate && !t->is_preempted;
    if (r == 0 && begins)
        r = delta_session_guide(t->session, t->run.guide, &err);
    if (r == 0 && begins)
        r = delta_session_generate(t->session, t->run.sampling, t->run.stopping, &err);
    if (r < 0) {
        abandon(t);
        err.code = r;
        end_with_error(e, t, &err);
        return true;
    }
    t->is_running = true;
    t->is_cancelled = t->is_preempted = false;
    atomic_store(&t->is_parked, false);
    e->n_running++;
    pause_run(e, t, t->wants_pause);
    tell(e, &(dd_note){ .kind = DD_NOTE_STARTED, .run = t->run.id });
    if (!t->run.generate && !t->run.n_ids)
        end_run(e, t, (dd_note){ .finish = DELTA_FINISH_STOP_ID });
    return true;
}

static void try_waiting(dd_engine *e)
{
    dd_timeline *t;
    while (e->has_room_changed && first_waiting(e)) {
        e->has_room_changed = false;
        while ((t = first_waiting(e))) {
            unwait(e, t); /* a run that ends at once may be freed by the loop */
            if (!start(e, t)) {
                wait_for_room(e, t);
                break;
            }
        }
    }
}

static void start_or_wait(dd_engine *e, dd_timeline *t)
{
    if (!dd_line_is_next(&e->waiting, t->place.rank) || !start(e, t))
        wait_for_room(e, t);
}

/* More room for the answers that have used up theirs. */
static void grow(dd_engine *e)
{
    delta_error err = { 0 };
    for (dd_timeline *t = e->all, *next; t; t = next) {
        next = t->next;
        const bool goes_on = t->is_running && !t->is_paused && !t->is_cancelled;
        uint32_t tokens = goes_on ? delta_session_short(t->session) : 0;
        if (!tokens)
            continue;
        const uint32_t rest = t->run.ctx_tokens - tokens;
        tokens += rest < e->answer_tokens ? rest : e->answer_tokens;
        const int r = make_room(e, t, tokens, &err);
        if (r == DELTA_EBUSY) {
            preempt(e, t);
        } else if (r < 0) {
            preempt(e, t);
            unwait(e, t);
            abandon(t);
            err.code = r;
            end_with_error(e, t, &err);
        }
        if (t->is_listed) /* who came next may have ended */
            next = t->next;
    }
}

/* Frees it, but not before its copies are made. */
static void free_timeline(dd_engine *e, dd_timeline *t)
{
    t->is_freed = true;
    if (atomic_load(&t->n_forks))
        return;
    drop_session(e, t);
    free(t);
}

static void fork_from(dd_engine *e, dd_timeline *t)
{
    dd_timeline *from = t->from;
    t->from = NULL;
    if (from->session && delta_session_fork(from->session, t, &t->session, NULL) == 0)
        list(e, t);
    if (atomic_fetch_sub(&from->n_forks, 1) == 1 && from->is_freed)
        free_timeline(e, from);
}

/* Runs of a user that are running or wait; those in the background are nobody's. */
static uint32_t runs_of(const dd_engine *e, uint64_t user)
{
    uint32_t n = 0;
    for (const dd_timeline *t = e->all; t; t = t->next)
        n += (t->is_running || t->is_fetching) && t->run.user == user && !t->run.is_background;
    for (dd_place *p = e->waiting.first; p; p = p->next)
        n += timeline_of(p)->run.user == user;
    return n;
}

static void on_event(dd_engine *e, const delta_event *v)
{
    dd_timeline *t = v->user;
    dd_note n = { .run = t->run.id };
    switch (v->kind) {
    case DELTA_EVENT_PREFILL:
        n.kind = DD_NOTE_PREFILL;
        n.done = v->prefill.done;
        n.total = v->prefill.total;
        n.cached = v->prefill.cached;
        tell(e, &n);
        if (!t->run.generate && n.done == n.total && t->is_running)
            end_run(e, t, (dd_note){ .finish = DELTA_FINISH_STOP_ID, .n_prompt = n.total });
        return;
    case DELTA_EVENT_TOKEN:
        n.kind = DD_NOTE_TOKEN;
        n.id = v->token.id;
        n.logprob = v->token.logprob;
        n.top = v->token.top;
        n.n_top = v->token.n_top;
        break;
    case DELTA_EVENT_TEXT:
        n.kind = DD_NOTE_TEXT;
        n.text = v->text.bytes;
        n.len = v->text.len;
        n.added_id = v->text.added_id;
        break;
    case DELTA_EVENT_FINISHED:
        n.finish = v->finished.reason;
        n.stop = v->finished.stop;
        n.n_prompt = v->finished.n_prompt;
        n.n_generated = v->finished.n_generated;
        n.prefill_ns = v->finished.prefill_ns;
        n.decode_ns = v->finished.decode_ns;
        if (n.finish == DELTA_FINISH_ERROR) {
            n.error = v->finished.error.code;
            n.text = v->finished.error.text;
            n.len = strlen(n.text);
        }
        if (t->is_running)
            end_run(e, t, n);
        return;
    }
    tell(e, &n);
}

/* As a cancel would end it if it ran. */
static void end_preempted(dd_engine *e, dd_timeline *t)
{
    const delta_event *events;
    size_t n;
    t->is_running = true;
    e->n_running++;
    delta_session_abort(t->session, &events, &n);
    for (size_t i = 0; i < n; i++)
        on_event(e, &events[i]);
}

static void grant(dd_engine *e, dd_timeline *t, uint32_t wishes)
{
    if (wishes & WISH_FORK)
        fork_from(e, t);
    if (wishes & WISH_SAVE) {
        t->has_save = true;
        e->n_saves++;
        if (!t->session)
            end_save(e, t, DELTA_ENOTFOUND, "nothing of the session is computed");
    }
    if (wishes & WISH_FREE) {
        free_timeline(e, t);
        return;
    }
    if (wishes & (WISH_PIN | WISH_UNPIN)) {
        t->is_pinned = (wishes & WISH_PIN) != 0;
        if (t->session)
            delta_session_set_pinned(t->session, t->is_pinned);
    }
    if (wishes & WISH_RUN) {
        if (wishes & WISH_CANCEL) {
            end_run(e, t, (dd_note){ .finish = DELTA_FINISH_CANCELLED });
            return;
        }
        t->wants_pause = false;
        t->place.rank = dd_line_rank(de_now_ns(), t->run.priority, runs_of(e, t->run.user));
        if (t->run.save_path && e->engine && !e->fault.code) /* without it the state is computed */
            (void)delta_cache_adopt(e->engine, t->run.save_path, t->run.save_at, t->owner, NULL);
        start_or_wait(e, t);
        return;
    }
    if (wishes & WISH_CANCEL) {
        if (t->is_fetching || t->is_waiting) {
            if (t->is_fetching)
                stop_fetching(e, t);
            else
                unwait(e, t);
            if (t->is_preempted)
                end_preempted(e, t);
            else
                end_run(e, t, (dd_note){ .finish = DELTA_FINISH_CANCELLED });
            return;
        }
        if (t->is_running) {
            pause_run(e, t, false);
            t->is_cancelled = true;
            delta_session_cancel(t->session);
            return;
        }
    }
    if (wishes & (WISH_PAUSE | WISH_RESUME)) {
        t->wants_pause = (wishes & WISH_PAUSE) != 0;
        if (t->is_running && !t->is_cancelled)
            pause_run(e, t, t->wants_pause);
    }
}

/* ---- the thread */

static void on_fault(dd_engine *e, const delta_error *err)
{
    e->fault = *err;
    e->fault.code = err->code ? err->code : DELTA_EDEVICE;
    for (dd_timeline *t = e->all, *next; t; t = next) {
        next = t->next;
        const bool waits = t->is_fetching;
        if (waits)
            stop_fetching(e, t);
        if (waits || t->is_running)
            end_with_error(e, t, &e->fault);
    }
    for (dd_timeline *t = e->all, *next; t; t = next) {
        next = t->next;
        end_save(e, t, e->fault.code, e->fault.text);
    }
    if (e->saving)
        tell_saved(e, e->saving, &e->fault, 0, 0);
    e->saving = 0;
    e->has_room_changed = true;
    try_waiting(e); /* each of them ends with the fault */
    tell_text(e, DD_NOTE_FATAL, e->fault.text, 0);
}

static void on_progress(void *arg, const char *phase, uint64_t done, uint64_t total)
{
    dd_engine *e = arg;
    uint64_t now = de_now_ns();
    atomic_fetch_add(&e->heartbeat, 1);
    if (now - e->told_ns < 100u * 1000 * 1000 && done && done != total) /* 0: a new phase */
        return;
    e->told_ns = now;
    tell_text(e, DD_NOTE_LOAD, phase ? phase : "", total ? (double)done / (double)total : 0);
    send_out(e);
}

static void on_engine_note(void *arg, enum delta_note_level level, const char *text)
{
    dd_engine *e = arg;
    tell(e, &(dd_note){ .kind = DD_NOTE_LOG,
                        .n = level == DELTA_NOTE_WARNING,
                        .text = text,
                        .len = strlen(text) });
}

static void snapshot(dd_engine *e)
{
    delta_engine_stats s;
    delta_engine_stats_get(e->engine, &s);
    s.disk_waiting = e->n_fetching;
    s.preemptions = e->n_preemptions;
    (void)pthread_mutex_lock(&e->stats_lock);
    e->stats = s;
    (void)pthread_mutex_unlock(&e->stats_lock);
}

/* ---- the cache on disk */

/* At the end the loop does not listen any more. */
static void on_disk_note(void *arg, enum delta_note_level level, const char *text)
{
    dd_engine *e = arg;
    if (dd_mailbox_is_closed(&e->box))
        dd_log(level == DELTA_NOTE_WARNING ? DD_LOG_WARNING : DD_LOG_INFO, "%s", text);
    else
        on_engine_note(e, level, text);
}

static void open_disk(dd_engine *e)
{
    delta_error err = { 0 };
    const delta_cache_options o = { .folder = e->cache_folder,
                                    .max_bytes = e->cache_bytes,
                                    .idle_ns = e->cache_idle_ns,
                                    .on_note = on_disk_note,
                                    .arg = e };
    if (e->cache_folder && delta_cache_open(e->engine, &o, &err) < 0)
        on_engine_note(e, DELTA_NOTE_WARNING, err.text);
}

/* The end of the save that is written, and the beginning of the next. */
static void work_saves(dd_engine *e)
{
    delta_error err = { 0 };
    uint64_t bytes = 0;
    uint32_t tokens = 0;
    int r = e->saving ? delta_cache_saved(e->engine, &bytes, &tokens, &err) : 1;
    if (r <= 0) {
        err.code = r;
        tell_saved(e, e->saving, r < 0 ? &err : NULL, bytes, tokens);
        e->saving = 0;
    }
    for (dd_timeline *t = e->all, *next; t && e->n_saves && !e->saving; t = next) {
        next = t->next;
        if (!t->has_save || (r = delta_cache_save(t->session, &t->save, &err)) == 1)
            continue;
        if (r < 0) {
            end_save(e, t, r, err.text);
            continue;
        }
        t->has_save = false;
        e->n_saves--;
        e->saving = t->save_id;
    }
}

/* A piece each way, and who has waited for one goes on. Says when that is to be done again. */
static uint64_t work_disk(dd_engine *e)
{
    delta_error err = { 0 };
    uint64_t again_ns = UINT64_MAX;
    const int r = delta_cache_work(e->engine, &again_ns, &err);
    if (r < 0) {
        err.code = r;
        on_fault(e, &err);
        return UINT64_MAX;
    }
    e->has_room_changed |= r > 0; /* what is written stays where it is until then */
    work_saves(e);
    for (dd_timeline *t = e->all, *next; t && e->n_fetching; t = next) {
        next = t->next;
        if (!t->is_fetching || delta_session_fetch(t->session) == 1)
            continue;
        stop_fetching(e, t);
        e->has_room_changed = true; /* what was held for it is the cache's now */
        start_or_wait(e, t);
    }
    return e->n_saves || e->saving ? SAVE_NS : again_ns;
}

static void *thread_main(void *arg)
{
    dd_engine *e = arg;
    delta_error err = { 0 };
    delta_engine *engine = NULL;
    int r = delta_engine_open(&e->options, &engine, &err);
    if (r < 0) {
        err.code = r;
        on_fault(e, &err);
    } else {
        e->engine = engine; /* the mailbox's lock orders this before READY */
        open_disk(e);
        snapshot(e);
        tell(e, &(dd_note){ .kind = DD_NOTE_READY });
    }
    send_out(e);
    for (uint64_t again_ns = 0;;) {
        bool idle = e->n_running == e->n_paused; /* until somebody wishes something, or the disk */
        const uint64_t wait_ms = again_ns / 1000000 < IDLE_MS ? again_ns / 1000000 : IDLE_MS;
        dd_mail *m;
        uint32_t wishes;
        while ((m = dd_mailbox_take(&e->box, idle ? (uint32_t)wait_ms : 0, &wishes))) {
            grant(e, (dd_timeline *)m, wishes);
            idle = false;
        }
        if (dd_mailbox_is_closed(&e->box))
            break;
        try_waiting(e);
        again_ns = e->engine && !e->fault.code ? work_disk(e) : UINT64_MAX;
        send_out(e); /* who was started hears of it before the step */
        if (!e->fault.code)
            grow(e);
        if (e->n_running > e->n_paused && !e->fault.code) {
            const delta_event *events = NULL;
            size_t n = 0;
            if (delta_step(e->engine, &events, &n, &err) < 0)
                on_fault(e, &err);
            else
                for (size_t i = 0; i < n; i++)
                    on_event(e, &events[i]);
        }
        try_waiting(e);
        if (e->engine)
            snapshot(e);
        atomic_fetch_add(&e->heartbeat, 1);
        send_out(e);
    }
    while (e->all)
        drop_session(e, e->all);
    if (e->engine)
        delta_cache_flush(e->engine);
    delta_engine_free(e->engine);
    return NULL;
}

/* ---- the loop's side */

static void free_batch(batch *b)
{
    free(b->bytes);
    free(b->notes);
    free(b);
}

static void on_async(uv_async_t *a)
{
    dd_engine *e = a->data;
    batch *b;
    while ((b = (batch *)dd_mailbox_receive(&e->box))) {
        for (uint32_t i = 0; i < b->n; i++)
            e->on_note(e->arg, &b->notes[i]);
        free_batch(b);
    }
}

int dd_engine_new(uv_loop_t *loop, const dd_config *c, void (*on_note)(void *arg, const dd_note *n),
                  void *arg, dd_engine **ret_e, delta_error *err)
{
    dd_engine *e = calloc(1, sizeof *e);
    if (!e)
        return delta_fail(err, DELTA_ENOMEM, "engine thread: %zu bytes", sizeof *e);
    e->on_note = on_note;
    e->arg = arg;
    e->options = (delta_engine_options){
        .model_dir = c->model.path,
        .backend = strcmp(c->model.backend, "cpu") == 0    ? DELTA_BACKEND_CPU
                   : strcmp(c->model.backend, "cuda") == 0 ? DELTA_BACKEND_CUDA
                                                           : DELTA_BACKEND_AUTO,
        .kv_type = strcmp(c->model.kv_type, "bf16") == 0  ? DELTA_KV_BF16
                   : strcmp(c->model.kv_type, "fp8") == 0 ? DELTA_KV_FP8
                                                          : DELTA_KV_AUTO,
        .threads = c->model.threads,
        .max_sessions = c->model.max_sessions,
        .kv_tokens = c->model.kv_tokens,
        .ctx_max = c->model.ctx_max,
        .step_tokens = c->model.step_tokens,
        .gap_ns = c->model.max_gap_ns,
        .checkpoints = c->cache.checkpoints,
        .cache_host_bytes = c->cache.host_bytes,
        .no_cache = !c->cache.enabled,
        .on_progress = on_progress,
        .on_note = on_engine_note,
        .arg = e,
    };
    e->async.data = e;
    e->answer_tokens = c->model.answer_tokens;
    if (c->state.directory[0] && c->cache.enabled && c->cache.disk_bytes) {
        e->cache_folder = de_path_join(c->state.directory, "cache");
        e->cache_bytes = c->cache.disk_bytes;
        e->cache_idle_ns = c->cache.disk_idle_ns;
    }
    if (pthread_mutex_init(&e->stats_lock, NULL) != 0 || dd_mailbox_init(&e->box, &e->async) < 0 ||
        uv_async_init(loop, &e->async, on_async) < 0) {
        free(e);
        return delta_fail(err, DELTA_ENOMEM, "engine thread: no mailbox");
    }
    if (pthread_create(&e->thread, NULL, thread_main, e) != 0)
        /* The handle is the loop's until it is closed; the process ends anyway. */
        return delta_fail(err, DELTA_ENOMEM, "engine thread: the system has none left");
    *ret_e = e;
    return 0;
}

static void on_closed(uv_handle_t *h)
{
    free(((dd_engine *)h->data)->cache_folder);
    free(h->data);
}

void dd_engine_free(dd_engine *e)
{
    if (!e)
        return;
    dd_mailbox_close(&e->box);
    (void)pthread_join(e->thread, NULL);
    for (batch *b; (b = (batch *)dd_mailbox_receive(&e->box));)
        free_batch(b);
    if (e->out)
        free_batch(e->out);
    dd_mailbox_done(&e->box);
    (void)pthread_mutex_destroy(&e->stats_lock);
    uv_close((uv_handle_t *)&e->async, on_closed);
}

const delta_engine_info *dd_engine_info(const dd_engine *e)
{
    return delta_engine_info_get(e->engine);
}

const delta_tokenizer *dd_engine_tokenizer(const dd_engine *e)
{
    return delta_engine_tokenizer(e->engine);
}

int dd_engine_check_save(const dd_engine *e, const char *path, uint64_t at, uint32_t *ret_tokens,
                         delta_error *err)
{
    return delta_cache_check(e->engine, path, at, ret_tokens, err);
}

void dd_engine_stats(dd_engine *e, delta_engine_stats *ret_stats)
{
    (void)pthread_mutex_lock(&e->stats_lock);
    *ret_stats = e->stats;
    (void)pthread_mutex_unlock(&e->stats_lock);
}

uint64_t dd_engine_heartbeat(const dd_engine *e)
{
    return atomic_load(&e->heartbeat);
}

dd_timeline *dd_timeline_new(dd_engine *e, uint64_t owner, bool keep)
{
    dd_timeline *t = calloc(1, sizeof *t);
    if (t) {
        t->engine = e;
        t->owner = owner;
        t->keep = keep;
    }
    return t;
}

void dd_timeline_run(dd_timeline *t, const dd_run *run)
{
    t->run = *run;
    dd_mailbox_post(&t->engine->box, &t->mail, WISH_RUN, WISH_CANCEL | WISH_PAUSE | WISH_RESUME);
}

void dd_timeline_cancel(dd_timeline *t)
{
    dd_mailbox_post(&t->engine->box, &t->mail, WISH_CANCEL, 0);
}

void dd_timeline_pause(dd_timeline *t, bool paused)
{
    dd_mailbox_post(&t->engine->box, &t->mail, paused ? WISH_PAUSE : WISH_RESUME,
                    paused ? WISH_RESUME : WISH_PAUSE);
}

dd_timeline *dd_timeline_fork(dd_timeline *from)
{
    dd_timeline *t = dd_timeline_new(from->engine, from->owner, true);
    if (t) {
        t->from = from;
        atomic_init(&t->is_parked, true);
        atomic_fetch_add(&from->n_forks, 1);
        dd_mailbox_post(&t->engine->box, &t->mail, WISH_FORK, 0);
    }
    return t;
}

bool dd_timeline_is_parked(const dd_timeline *t)
{
    return atomic_load(&t->is_parked);
}

void dd_timeline_pin(dd_timeline *t, bool pinned)
{
    dd_mailbox_post(&t->engine->box, &t->mail, pinned ? WISH_PIN : WISH_UNPIN,
                    pinned ? WISH_UNPIN : WISH_PIN);
}

void dd_timeline_save(dd_timeline *t, uint64_t id, const delta_save *o)
{
    t->save = *o;
    t->save_id = id;
    dd_mailbox_post(&t->engine->box, &t->mail, WISH_SAVE, 0);
}

void dd_timeline_free(dd_timeline *t)
{
    if (t)
        dd_mailbox_post(&t->engine->box, &t->mail, WISH_FREE, 0);
}
