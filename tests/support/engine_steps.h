/* engine_steps.h -- drives an engine in a test: steps, and what sessions have said. */
#ifndef ENGINE_STEPS_H
#define ENGINE_STEPS_H

#pragma GCC diagnostic ignored "-Wunused-function"

#include "support/tap.h"

#include "delta/delta.h"

static int64_t counted_added = 300; /* the added token that n_added is of */

typedef struct result {
    uint32_t ids[600];
    float logprobs[600];
    uint32_t n;
    char text[2000];
    size_t len;
    bool finished;
    uint32_t n_added, prefill_done, prefill_total;
    enum delta_finish reason;
    uint32_t stop, n_prompt, n_cached, n_generated;
    delta_error error;
} result;

static void note_events(const delta_event *v, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        result *x = v[i].user;
        CHECK(!x->finished);
        switch (v[i].kind) {
        case DELTA_EVENT_PREFILL:
            x->prefill_done = v[i].prefill.done;
            x->prefill_total = v[i].prefill.total;
            break;
        case DELTA_EVENT_TOKEN:
            x->ids[x->n] = v[i].token.id;
            x->logprobs[x->n++] = v[i].token.logprob;
            break;
        case DELTA_EVENT_TEXT:
            memcpy(x->text + x->len, v[i].text.bytes, v[i].text.len);
            x->len += v[i].text.len;
            x->n_added += v[i].text.added_id == counted_added;
            break;
        case DELTA_EVENT_FINISHED:
            x->finished = true;
            x->reason = v[i].finished.reason;
            x->stop = v[i].finished.stop;
            x->n_prompt = v[i].finished.n_prompt;
            x->n_cached = v[i].finished.n_cached;
            x->n_generated = v[i].finished.n_generated;
            x->error = v[i].finished.error;
            break;
        }
    }
}

static int step(delta_engine *e)
{
    const delta_event *v;
    size_t n;
    int r = delta_step(e, &v, &n, NULL);
    if (r == 0)
        note_events(v, n);
    return r < 0 ? r : (int)n;
}

static void run(delta_engine *e, delta_session *s)
{
    for (int i = 0; i < 5000 && delta_session_busy(s); i++)
        (void)step(e);
    CHECK(!delta_session_busy(s));
}

static const delta_sampling greedy = { .top_p = 1, .repetition_penalty = 1 };

static delta_session *new_session(delta_engine *e, uint32_t ctx, result *x)
{
    delta_session *s = NULL;
    memset(x, 0, sizeof *x);
    CHECK_EQ(delta_session_new(e, 0, x, &s, NULL), 0);
    CHECK_EQ(delta_session_reserve(s, ctx, NULL), 0);
    return s;
}

#endif
