/* internal.h -- the fields of an engine and a session, for the files of api/. */
#ifndef DE_API_INTERNAL_H
#define DE_API_INTERNAL_H

#include <stdatomic.h>

#include "api/checkpoint.h"
#include "api/guide.h"
#include "base/clock.h"
#include "cache/gdn_slots.h"
#include "cache/kv_pages.h"
#include "cache/prefix.h"
#include "delta/engine.h"
#include "delta/session.h"
#include "delta/step.h"
#include "model/forward.h"
#include "sample/sample.h"
#include "sample/stop.h"
#include "sched/plan.h"

/* Events of a session in one step: PREFILL, TOKEN and at most 5 TEXT for each token, FINISHED. One
 * token is drawn; tokens that must come next follow it at once. */
enum {
    DE_TOKENS_PER_STEP = 1 + DE_FORCED_MAX,
    DE_EVENTS_PER_SESSION = 2 + DE_TOKENS_PER_STEP * 6,
    /* A long append is kept a state of every so many tokens, wherever it came from. */
    DE_MARK_EVERY = 4096,
    /* A state less than that behind another one is not worth a slot when its session ends. */
    DE_MARK_GAIN = 16,
};

/* All of this is allocated by delta_engine_open(). */
struct delta_engine {
    delta_engine_info info;
    char *model_name;
    const de_backend *backend;
    char quantization[64];

    de_shape shape;
    de_weights *weights;
    de_binding *binding;
    de_model *model;
    delta_tokenizer *tokenizer;
    de_think_tags think;
    uint32_t *holes; /* ids below the tokenizer's size without a token */
    de_vocab_mask mask;

    de_kv_pages kv;
    de_gdn_slots slots;
    bool has_cache;
    de_prefix prefix;
    de_prefix_host host;     /* the second tier, if host_memory: ... */
    uint8_t *host_memory;    /* ... its pages, then its slots */
    struct de_disk *disk;    /* the third tier, or NULL */
    uint64_t refused_ns;     /* when who asked for pages last was refused, or 0 */
    delta_session **by_seat; /* [max_sessions], NULL where free: those that have a slot and pages */

    /* one step */
    uint32_t step_tokens, max_seqs;
    de_pace pace;
    de_shares shares;        /* by owner */
    uint32_t *row_tokens;    /* [step_tokens] */
    uint32_t (*row_pos)[3];  /* [step_tokens] */
    de_plan_item *items;     /* [max_sessions] */
    delta_session **of_item; /* [max_sessions] */
    uint32_t *order;         /* [max_sessions] */
    de_batch_seq *seqs;      /* [max_seqs] */
    de_batch_mark *marks;    /* [step_tokens / DE_CHUNK + max_seqs] */
    float *logits;           /* [max_seqs, n_vocab] */
    de_top_logits *tops;     /* [max_seqs] of rows that need no more */
    de_sample_scratch scratch;
    uint32_t *allowed;   /* [n_vocab / 32 + 1] the mask of one row */
    delta_event *events; /* [max_sessions * DE_EVENTS_PER_SESSION] */
    size_t n_events;
    char *
        text; /* [max_sessions + 1, text_bytes]: what the events of a seat's session point to; one more
                   for a session without a seat that is ended */
    size_t text_bytes;
    delta_top_logprob *top; /* [max_sessions, DELTA_MAX_TOP_LOGPROBS] */

    delta_engine_stats stats;
    delta_error fault; /* code != 0: a forward failed, there is no going on */
};

struct delta_session {
    delta_engine *engine;
    void *user;
    uint64_t owner;
    /* While it is resident: a seat, a state slot and pages for `room` tokens. */
    uint32_t seat; /* UINT32_MAX: none, and none of the others */
    uint32_t slot;
    uint32_t *pages; /* [n_pages] */
    uint32_t n_pages;
    uint32_t room;     /* tokens reserved */
    uint32_t limit;    /* of the timeline, where that is more; or 0 */
    uint32_t capacity; /* of tokens, cuts and marks */
    uint32_t *tokens;  /* [capacity] */
    uint8_t *cuts;     /* [capacity / 8 + 1] bit i: an append ended before token i */
    uint8_t *marks;    /* [capacity / DE_CHUNK / 8 + 1] bit i: the state behind i chunks is kept */

    /* 0 <= computed <= n; appended_end <= n. Tokens from computed on wait for a step. */
    uint32_t n, computed;
    uint32_t appended_from; /* where the appends begin that are being computed */
    uint32_t appended_end;  /* and end; work is pending while computed < appended_end */
    uint32_t piece_from;    /* start of what is computed up to the next cut; <= computed */
    uint32_t settled;       /* behind the last token that was sampled, or ever computed */
    float *saved_logits;    /* [n_vocab] of the last token */
    bool has_logits;        /* they are valid: computed == n, nothing was sampled from them */
    bool is_bad;      /* its state gave logits that are no numbers: nobody may go on from it */
    uint32_t waited;  /* steps without a row */
    size_t text_used; /* of the slot's text, by this step */
    bool paused, is_background, is_pinned;
    uint32_t
        guard_end; /* of the node that it guards while it is pinned and not resident; 0: none */
    uint64_t guard_serial;
    uint64_t active_ns; /* it was computed on last */
    uint32_t rested;    /* `computed` when its state was last kept for the disk */
    uint32_t fetched;   /* `n` when the disk was last asked for it */
    atomic_bool cancel;

    /* this turn: from the first append or generate after the last FINISHED */
    bool in_turn;
    bool goes_on;                           /* it was parked in this turn */
    uint32_t turn_cached;                   /* tokens that were in the state when it began */
    uint32_t turn_shared;                   /* tokens of it that some kept prefix begins with */
    uint64_t work_ns;                       /* start of the running piece of prefill, or 0 */
    uint64_t prefill_ns, first_ns, last_ns; /* spent before; times of first and last token */

    /* a generation */
    bool generating;
    uint32_t n_prompt, n_generated, max_tokens, min_tokens;
    uint32_t stop_ids[DELTA_MAX_STOP_IDS + DE_CHECKPOINT_EOS]; /* model's own and requested */
    uint32_t n_stop_ids;
    de_sampler sampler;
    de_guide guide;
    de_stop stop;
    delta_detok detok;
};

static inline bool de_session_is_resident(const delta_session *s)
{
    return s->seat != UINT32_MAX;
}

static inline bool de_session_uses_cache(const delta_session *s)
{
    return s->engine->has_cache && s->owner != DELTA_OWNER_NONE;
}

/* Where something DE_ON_HOST lies. */
static inline uint8_t *de_host_page(const delta_engine *e, uint32_t page)
{
    return e->host_memory + (page & ~DE_ON_HOST) * (size_t)e->prefix.page_bytes;
}
static inline uint8_t *de_host_slot(const delta_engine *e, uint32_t slot)
{
    return e->host_memory + e->host.kv.total * (size_t)e->prefix.page_bytes +
           (slot & ~DE_ON_HOST) * (size_t)e->prefix.slot_bytes;
}

/* The timeline ends behind n tokens; the state may not hold more. */
void de_session_truncate(delta_session *s, uint32_t n);

/* The state behind s->computed into the cache, in the slot or, to keep that, in a copy. false: it
 * is not worth it, or was there, or there is no room; the slot is as before. */
bool de_session_keep(delta_session *s, bool copy);

/* A state slot that is free, or was given up by the cache. false: all are sessions' own. */
bool de_engine_take_slot(delta_engine *e, uint32_t *ret_slot);
/* Pages, of those that are free and those that only the cache holds. DELTA_EBUSY. */
int de_engine_take_pages(delta_engine *e, uint32_t n, uint32_t *ret_pages, delta_error *err);

/* disk.c. All are no-ops without a third tier. */
/* 1: something that s goes on from, of at most `most` tokens, is on its way from the disk. 0: there is nothing
 * to be had. DELTA_EBUSY: there is no room for it. */
int de_disk_fetch(delta_engine *e, delta_session *s, uint32_t most);
void de_disk_left(delta_engine *e, const delta_session *s); /* s goes */
void de_disk_touch(delta_engine *e, de_prefix_node *node);  /* it was of use; or NULL */
/* What is kept of ids [n] behind `from` is bad. */
void de_disk_forget(delta_engine *e, uint64_t owner, const uint32_t *ids, uint32_t n,
                    uint32_t from);
void de_disk_stats(const delta_engine *e, delta_engine_stats *s);
void de_disk_free(delta_engine *e);

/* Tokens that must be reserved for its next step. */
static inline uint32_t de_session_needs(const delta_session *s)
{
    const uint32_t next = s->n + DE_TOKENS_PER_STEP, end = s->n_prompt + s->max_tokens;
    return !s->generating ? s->n : next < end ? next : end;
}

static inline bool de_session_has_work(const delta_session *s)
{
    return s->generating || s->computed < s->appended_end;
}

#endif
