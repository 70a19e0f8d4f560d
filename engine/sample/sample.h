/* sample.h -- one row of logits to one token.
 *
 * The rules are those of delta/sampling.h. Two things are fixed here so that a
 * result is the same on every machine and by every method of selection: ids are
 * ranked by (adjusted logit, larger first; id, smaller first), and the draw
 * walks what is left in the order of ids, in double precision.
 *
 * No step sorts the vocabulary: top-k is a heap of k, top-p takes from a heap
 * until it has enough. Where the first few in rank are all that counts, they can
 * come from a device (de_sample_ranked()).
 *
 * Ownership  tables of penalties belong to the de_sampler and are allocated by
 *            de_sampler_start(); drawing allocates nothing.
 * Threads    one thread; the scratch is shared by all samplers of that thread. */
#ifndef DE_SAMPLE_H
#define DE_SAMPLE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/top_logits.h"
#include "delta/error.h"
#include "delta/sampling.h"

typedef struct de_sample_scratch {
    de_candidate *candidates; /* [n_vocab] */
    double *weights;          /* [n_vocab] */
    float *raw;               /* [n_vocab] */
    uint32_t n_vocab;
} de_sample_scratch;

/* Bytes that de_sample_scratch_init() takes. */
uint64_t de_sample_scratch_bytes(uint32_t n_vocab);
int de_sample_scratch_init(de_sample_scratch *x, uint32_t n_vocab, delta_error *err);
void de_sample_scratch_done(de_sample_scratch *x);

/* What can never be drawn: ids from n_tokens on, and the holes below it. */
typedef struct de_vocab_mask {
    uint32_t n_vocab, n_tokens;
    const uint32_t *holes; /* ids below n_tokens without a token */
    uint32_t n_holes;
} de_vocab_mask;

typedef struct de_sampler {
    delta_sampling p; /* p.bias is owned */
    delta_logit_bias *bias;
    uint32_t *seen;     /* [n_vocab] DE_SEEN_* of each id; NULL without penalties */
    uint32_t *distinct; /* the ids with an entry in seen */
    uint32_t n_distinct, cap_distinct;
} de_sampler;

/* Copies the parameters (checked before) and, where penalties ask for it, counts the prompt.
 * max_tokens: how many may be drawn. On failure s is empty. DELTA_ENOMEM. */
int de_sampler_start(de_sampler *s, const delta_sampling *p, uint32_t n_vocab,
                     const uint32_t *prompt, size_t n_prompt, uint32_t max_tokens,
                     delta_error *err);
void de_sampler_done(de_sampler *s); /* also of a zeroed one, also twice */

typedef struct de_drawn {
    uint32_t id;
    float logprob; /* NAN if not asked for */
    uint32_t n_top;
} de_drawn;

typedef struct de_top {
    uint32_t id;
    float logprob;
} de_top;

/* What may come. */
typedef struct de_choice {
    const de_vocab_mask *mask;
    const uint32_t *barred; /* ids that may not come now (stop ids before min_tokens) */
    uint32_t n_barred;
    const uint32_t *allowed; /* one bit an id [n_vocab / 32, rounded up], or NULL: all */
    const uint32_t *forced;  /* the one that comes, whatever the logits say; or NULL */
} de_choice;

/* Draws the token at `position` and counts it. logits [n_vocab] are changed. top has room for
 * p.top_logprobs.
 * DELTA_EINTERNAL: logits that are NaN or +inf, or nothing left to draw from. */
int de_sample(de_sampler *s, const de_choice *c, float *logits, uint64_t position,
              de_sample_scratch *x, de_drawn *ret_drawn, de_top *top, delta_error *err);

/* How many of the first in rank of what may come are all that a draw can depend on; 0: it may depend on all. */
uint32_t de_sampler_ranks(const de_sampler *s);
/* As de_sample(), to the bit, from the `n` first in rank of the ids below the mask's n_tokens, in that order: enough are
 * de_sampler_ranks() of them and one more for each hole and each barred id. c->allowed is NULL. is_sound: no logit of the row is NaN
 * or +inf. */
int de_sample_ranked(de_sampler *s, const de_choice *c, const de_candidate *first, uint32_t n,
                     bool is_sound, uint64_t position, de_sample_scratch *x, de_drawn *ret_drawn,
                     delta_error *err);

bool de_sampler_wants_logprobs(const de_sampler *s);
void de_sampler_note(de_sampler *s, uint32_t id); /* counts a token that came without a draw */

#endif
