/* sampling.h -- how the next token is chosen, and when a generation ends.
 *
 * Order of work on one row of logits l (f32, raw model output):
 *   1. logit bias and penalties        l' (repetition: prompt and output;
 *                                      presence, frequency: output only)
 *   2. ids that are no token, and stop ids before min_tokens, become -inf
 *   3. temperature 0 is greedy: the largest l', the lowest id on a tie
 *   4. else p = softmax(l' / temperature), then min_p, top_k, top_p in that
 *      order, then one draw from a counter-based generator keyed by
 *      (seed, position of the token in its session)
 * A result depends on (model, tokens so far, these parameters, seed), never on
 * what else is in the batch. Reported log probabilities are those of the raw
 * logits, before step 1. */
#ifndef DELTA_SAMPLING_H
#define DELTA_SAMPLING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/error.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DELTA_MAX_STOP_STRINGS = 16,
    DELTA_MAX_STOP_BYTES = 256, /* of one stop string */
    DELTA_MAX_STOP_IDS = 64,
    DELTA_MAX_LOGIT_BIAS = 1024,
    DELTA_MAX_TOP_LOGPROBS = 20,
};

typedef struct delta_logit_bias {
    uint32_t token;
    float bias; /* -100 .. 100, added to the logit */
} delta_logit_bias;

typedef struct delta_sampling {
    float temperature;            /* 0 .. 100; 0 is greedy */
    uint32_t top_k;               /* 0: off */
    float top_p;                  /* (0, 1]; 1: off */
    float min_p;                  /* [0, 1]; 0: off */
    float presence_penalty;       /* -2 .. 2 */
    float frequency_penalty;      /* -2 .. 2 */
    float repetition_penalty;     /* (0, 10]; 1: off */
    uint64_t seed;                /* always used; the caller draws one if its user gave none */
    const delta_logit_bias *bias; /* borrowed during the call that takes this struct */
    uint32_t n_bias;
    bool logprobs;         /* report the chosen token's log probability */
    uint32_t top_logprobs; /* and that many alternatives, 0 .. DELTA_MAX_TOP_LOGPROBS */
    bool any_id;           /* also ids without a token (vocabulary mask off): for golden runs */
} delta_sampling;

typedef struct delta_stop_string {
    const char *bytes; /* need not end in NUL; borrowed during the call */
    size_t len;        /* 1 .. DELTA_MAX_STOP_BYTES */
} delta_stop_string;

typedef struct delta_stopping {
    uint32_t max_tokens; /* >= 1; also bounded by the session's room */
    uint32_t min_tokens; /* no stop id before that many */
    const delta_stop_string *strings;
    uint32_t n_strings;
    const uint32_t *ids; /* besides the model's own end-of-turn ids */
    uint32_t n_ids;
    bool ignore_eos; /* the model's own ids do not stop (nor do they get masked) */
} delta_stopping;

/* Temperature 0.6, top_p 0.95, top_k 20 if thinking, else 0.7, 0.8, 20:
 * used where the checkpoint's generation_config.json says nothing. */
delta_sampling delta_sampling_default(bool thinking);

/* Checks every range above. 0 or DELTA_EINVALID naming field, value and range.
 * n_vocab bounds the ids. */
int delta_sampling_check(const delta_sampling *s, uint32_t n_vocab, delta_error *err);
int delta_stopping_check(const delta_stopping *s, uint32_t n_vocab, delta_error *err);

#ifdef __cplusplus
}
#endif
#endif
