/* internal.h -- the fields of an engine and a session, for the files of api/. */
#ifndef DE_API_INTERNAL_H
#define DE_API_INTERNAL_H

#include <stdatomic.h>

#include "api/checkpoint.h"
#include "api/guide.h"
#include "base/clock.h"
#include "cache/gdn_slots.h"
#include "cache/kv_pages.h"
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
    delta_session **by_slot; /* [max_sessions], NULL where free */

    /* one step */
    uint32_t step_tokens, max_seqs;
    uint32_t *row_tokens;    /* [step_tokens] */
    uint32_t (*row_pos)[3];  /* [step_tokens] */
    de_plan_item *items;     /* [max_sessions] */
    delta_session **of_item; /* [max_sessions] */
    uint32_t *order;         /* [max_sessions] */
    de_batch_seq *seqs;      /* [max_seqs] */
    float *logits;           /* [max_seqs, n_vocab] */
    de_sample_scratch scratch;
    uint32_t *allowed;   /* [n_vocab / 32 + 1] the mask of one row */
    delta_event *events; /* [max_sessions * DE_EVENTS_PER_SESSION] */
    size_t n_events;
    char *text; /* [max_sessions, text_bytes]: what the events of a slot's session point to */
    size_t text_bytes;
    delta_top_logprob *top; /* [max_sessions, DELTA_MAX_TOP_LOGPROBS] */

    delta_engine_stats stats;
    delta_error fault; /* code != 0: a forward failed, there is no going on */
};

struct delta_session {
    delta_engine *engine;
    void *user;
    uint32_t slot;   /* UINT32_MAX: none yet */
    uint32_t *pages; /* [n_pages] */
    uint32_t n_pages;
    uint32_t room;    /* tokens reserved */
    uint32_t *tokens; /* [room] */
    uint8_t *cuts;    /* [room / 8 + 1] bit i: an append ended before token i */

    /* 0 <= computed <= n; appended_end <= n. Tokens from computed on wait for a step. */
    uint32_t n, computed;
    uint32_t appended_from; /* where the appends begin that are being computed */
    uint32_t appended_end;  /* and end; work is pending while computed < appended_end */
    uint32_t piece_from;    /* start of what is computed up to the next cut; <= computed */
    uint32_t sampled_end;   /* behind the last sampled token */
    float *saved_logits;    /* [n_vocab] of the last token */
    bool has_logits;        /* they are valid: computed == n, nothing was sampled from them */
    uint32_t waited;        /* steps without a row */
    size_t text_used;       /* of the slot's text, by this step */
    bool paused;
    atomic_bool cancel;

    /* this turn: from the first append or generate after the last FINISHED */
    bool in_turn;
    uint32_t turn_cached;                   /* tokens that were in the state when it began */
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

static inline bool de_session_has_work(const delta_session *s)
{
    return s->generating || s->computed < s->appended_end;
}

#endif
