/* guide.h -- what a generation is held to besides its sampling: the budget of its reasoning, and a
 * grammar.
 *
 * A guide knows which tokens must come next, whatever the model would say. They stand in a queue;
 * step.c takes from it before it draws, and tells the guide of every token that came, drawn or not.
 * Where the grammar leaves a choice it has a mask.
 *
 * The budget  after budget_tokens of reasoning the queue gets "\n</think>\n\n" as the template
 *             writes it, without the first newline where there is one already. Not in the middle of
 *             a character (up to 3 tokens later), and not inside what may be opening
 *             a call, or a call: its values may hold anything, and its end ends the reasoning anyway.
 *
 * Ownership   part of a session. After de_guide_start() only the search for forced text allocates,
 *             for a moment; where it cannot, nothing is forced.
 * Threads     engine thread. */
#ifndef DE_GUIDE_H
#define DE_GUIDE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/session.h"

enum { DE_FORCED_MAX = 16 }; /* tokens in the queue */

/* What closes reasoning; ids of the tokenizer, found once. close_id < 0: the checkpoint has no such
 * token, and budgets are refused. */
typedef struct de_think_tags {
    int64_t close_id;                          /* </think> */
    uint32_t after_text[DE_FORCED_MAX / 2];    /* "\n</think>\n\n" */
    uint32_t after_newline[DE_FORCED_MAX / 2]; /* "</think>\n\n" */
    uint32_t n_after_text, n_after_newline;
} de_think_tags;

int de_think_tags_find(const delta_tokenizer *t, de_think_tags *ret_tags, delta_error *err);

typedef struct de_guide {
    const de_think_tags *tags;
    bool in_reasoning; /* under a budget */
    uint32_t budget, n_reasoning;
    bool after_newline;
    uint8_t call; /* how much of "<tool_call>, white space, <function=" came; all: inside a call */
    delta_matcher *matcher; /* or NULL */
    bool is_lost;           /* it refused a token that came */
    uint32_t queue[DE_FORCED_MAX];
    uint32_t n_queue, at;
} de_guide;

/* g: NULL for a generation without any. DELTA_EUNSUPPORTED: a budget, and no </think>. */
int de_guide_start(de_guide *guide, const de_think_tags *tags, const delta_guide *g,
                   delta_error *err);

void de_guide_done(de_guide *guide); /* also of a zeroed one, also twice */

/* Whether every token may come, but for those in the queue. */
static inline bool de_guide_is_free(const de_guide *guide)
{
    return !guide->matcher;
}

/* The token that must come next, which stays in the queue until de_guide_took(). */
bool de_guide_forced(const de_guide *guide, uint32_t *ret_id);

/* What may be drawn: DELTA_MASK_FREE (allowed stays untouched), SET, or DEAD. allowed: one bit an id
 * of the vocabulary. */
enum delta_mask_kind de_guide_mask(de_guide *guide, uint32_t *allowed);

/* The token came. bytes: its text. in_character: the text ends inside a character. */
void de_guide_took(de_guide *guide, uint32_t id, const uint8_t *bytes, size_t len,
                   bool in_character);

#endif
