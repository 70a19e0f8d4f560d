/* engine_thread.h -- the one thread that calls the engine, and how the loop asks it for things.
 *
 * A timeline is a sequence at the engine: of one request, or of a named session over many turns.
 * One run at a time: append tokens, and generate after them or not. If the engine has no room the
 * run waits here in line (line.h) and is tried again whenever a sequence gave up its place. With
 * nothing to compute, or when the readers of all that run are slow, the thread sleeps.
 *
 * An answer begins with room for a part of it and gets more as it grows. Where there is none, a run in the
 * background ends, a timeline that rests is parked, and then a run is preempted: of lower priority, or, for
 * one that grows, of the same and behind it in line; if there is none, itself. It waits in its old place of
 * the line and goes on from its state. So the run that is first in line of those with the highest
 * priority always gets on, and alone it has room: no timeline may be longer than all pages.
 *
 * Every run ends with exactly one FINISHED note; until then what the run points to must stay.
 * After it a timeline without `keep` has no engine session any more; one with it is as before if the
 * turn did not happen (cancelled or failed before its first token).
 *
 * Threads    all functions are the loop's; notes come on the loop. */
#ifndef DD_ENGINE_THREAD_H
#define DD_ENGINE_THREAD_H

#include "daemon/config.h"
#include "daemon/mailbox.h"
#include "delta/delta.h"

typedef struct dd_engine dd_engine;

enum dd_note_kind {
    DD_NOTE_LOAD,  /* text: the phase; progress */
    DD_NOTE_READY, /* the engine is open */
    DD_NOTE_FATAL, /* text: why; all runs have ended */
    DD_NOTE_LOG,   /* text: a warning of the engine's */
    DD_NOTE_QUEUED, /* no room yet, still none, or no more: it made room for another; n runs are before it */
    DD_NOTE_STARTED, /* the engine took the run, or has it again */
    DD_NOTE_PREFILL,
    DD_NOTE_TOKEN,
    DD_NOTE_TEXT,
    DD_NOTE_FINISHED,
    DD_NOTE_SAVED, /* run: the save's id; error, or 0, total: tokens, and bytes */
};

typedef struct dd_note {
    enum dd_note_kind kind;
    uint64_t run;     /* dd_run.id */
    const char *text; /* LOAD, FATAL, LOG, TEXT */
    size_t len;
    int64_t added_id; /* TEXT */
    double progress;
    uint32_t n;                   /* QUEUED */
    uint32_t done, total, cached; /* PREFILL */
    uint32_t id;                  /* TOKEN */
    float logprob;
    const delta_top_logprob *top;
    uint32_t n_top;
    /* FINISHED */
    enum delta_finish finish;
    uint32_t stop, n_prompt, n_generated;
    uint32_t n_cached, n_shared; /* delta_session_reuse() */
    uint64_t prefill_ns, decode_ns;
    uint32_t n_timeline, last_token; /* what the timeline holds now */
    int error;                       /* DELTA_FINISH_ERROR and SAVED: the code, text says it */
    uint64_t bytes;                  /* SAVED */
} dd_note;

typedef struct dd_run {
    uint64_t id;
    uint32_t n_before; /* tokens of the timeline that stay: what came later is taken back first */
    const uint32_t *ids;
    size_t n_ids;
    const uint32_t *marks; /* [n_marks] positions in ids: delta_session_mark() */
    size_t n_marks;
    uint32_t ctx_tokens;     /* what the timeline may come to */
    uint32_t reserve_tokens; /* room it must have to begin */
    bool generate;
    bool is_background; /* for rows that nobody wants, on a place that anybody may take: it is
                           cancelled then, as it is if there is none. Without generate and keep */
    int priority;       /* higher first */
    uint64_t user;      /* whose it is: those with less in work go first */
    const delta_sampling *sampling;
    const delta_stopping *stopping;
    const delta_guide *guide; /* or NULL */
    const char *save_path;    /* a save that the timeline may go on from, or NULL, and where ... */
    uint64_t save_at;         /* ... its state is */
} dd_run;

typedef struct dd_timeline dd_timeline;

/* on_note may start runs and free timelines; text of a note is borrowed. */
int dd_engine_new(uv_loop_t *loop, const dd_config *c, void (*on_note)(void *arg, const dd_note *n),
                  void *arg, dd_engine **ret_e, delta_error *err);
/* Ends the thread (waits for the running step); all runs must have ended. */
void dd_engine_free(dd_engine *e);

/* After READY. */
const delta_engine_info *dd_engine_info(const dd_engine *e);
const delta_tokenizer *dd_engine_tokenizer(const dd_engine *e);
/* delta_cache_check() of a save. Any thread. */
int dd_engine_check_save(const dd_engine *e, const char *path, uint64_t at, uint32_t *ret_tokens,
                         delta_error *err);
void dd_engine_stats(dd_engine *e, delta_engine_stats *ret_stats); /* as of the last step */
uint64_t dd_engine_heartbeat(const dd_engine *e);

/* owner: whose prefixes it finds and leaves. NULL: out of memory. */
dd_timeline *dd_timeline_new(dd_engine *e, uint64_t owner, bool keep);
void dd_timeline_run(dd_timeline *t, const dd_run *run);
void dd_timeline_cancel(dd_timeline *t);
void dd_timeline_pause(dd_timeline *t, bool paused);
/* A timeline like `from`, to keep, with what that holds when the engine thread comes to it: a run says
 * how much of it stays. If there is no memory for it then its first run ends with an error. */
dd_timeline *dd_timeline_fork(dd_timeline *from);
/* Whether it left the device for somebody who needed its place, or was never there. */
bool dd_timeline_is_parked(const dd_timeline *t);
/* What it has computed is given up last. */
void dd_timeline_pin(dd_timeline *t, bool pinned);
/* Saves its state; ends with a SAVED note of this id, until which what *o points to must stay. One at a time
 * for a timeline. */
void dd_timeline_save(dd_timeline *t, uint64_t id, const delta_save *o);
void dd_timeline_free(dd_timeline *t); /* its run must have ended; NULL is a no-op */

#endif
