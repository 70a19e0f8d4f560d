/* step.h -- one turn of the engine, and the events it produced.
 *
 * A step plans rows over all sessions that have work (decode rows first, then
 * prefill chunks up to step_tokens), runs one forward, samples, and reports.
 * READ engine/api/step.c FIRST to understand the engine. */
#ifndef DELTA_STEP_H
#define DELTA_STEP_H

#include "delta/session.h"

#ifdef __cplusplus
extern "C" {
#endif

enum delta_event_kind {
    DELTA_EVENT_PREFILL,  /* progress of appended tokens; the last has done == total */
    DELTA_EVENT_TOKEN,    /* a sampled token, including the stop token */
    DELTA_EVENT_TEXT,     /* text released by it: complete characters, stop strings held back */
    DELTA_EVENT_FINISHED, /* generation (or a cancelled or failed prefill) ended; the last event */
};

enum delta_finish {
    DELTA_FINISH_STOP_ID,     /* an end-of-turn or requested id; its text is not emitted */
    DELTA_FINISH_STOP_STRING, /* text up to the string was emitted */
    DELTA_FINISH_LENGTH,      /* max_tokens or the session's room */
    DELTA_FINISH_CANCELLED,
    DELTA_FINISH_ERROR, /* this session only; error says why */
};

typedef struct delta_top_logprob {
    uint32_t id;
    float logprob;
} delta_top_logprob;

struct delta_event {
    enum delta_event_kind kind;
    delta_session *session;
    void *user;
    union {
        struct {
            uint32_t done, total; /* tokens of this append */
            uint32_t cached;      /* of them, found in the prefix cache */
        } prefill;
        struct {
            uint32_t id;
            float logprob;                /* raw; NAN if not asked for */
            const delta_top_logprob *top; /* descending; n_top entries */
            uint32_t n_top;
        } token;
        struct {
            const char *bytes; /* len bytes of UTF-8 */
            size_t len;
            int64_t added_id; /* the whole piece is this added token's text, else -1 */
        } text;
        struct {
            enum delta_finish reason;
            uint32_t stop;                  /* the id, or the index of the stop string */
            uint32_t n_prompt;              /* the timeline where generation began */
            uint32_t n_cached;              /* of it, in the state when the turn began */
            uint32_t n_generated;           /* with the stop token */
            uint64_t prefill_ns, decode_ns; /* first step to first token; first to last token */
            delta_error error;
        } finished;
    };
};

/* Takes one step. *ret_events (borrowed, valid until the next call, also when a session of them
 * is freed before) has *ret_n
 * entries in order. *ret_n == 0 and no session busy: there was nothing to do.
 * A negative return is fatal for the engine (device fault): free it. */
int delta_step(delta_engine *e, const delta_event **ret_events, size_t *ret_n, delta_error *err);

#ifdef __cplusplus
}
#endif
#endif
