/* recall.h -- what was sampled, by names that come back: the ids of its tool calls, or its text.
 *
 * Clients send an answer back in their own spelling: keys in another order, 1.0 for 1, the reasoning
 * left out. Rendered from that the prompt would differ from what the model wrote, and nothing
 * computed before could be used again. The ids of the calls are the one thing that comes back as it
 * went out, and nobody can guess them: who sends an answer's ids gets its bytes. An answer without
 * calls comes back as its content. And a text may be several sequences of tokens: those that were
 * sampled are kept with it.
 *
 * Limits     DD_RECALL_TURNS turns, DD_RECALL_BYTES; a quarter of both for one user, whose oldest
 *            goes first. DD_RECALL_TURN_BYTES of text of one turn, longer ones are not kept.
 * Threads    the loop. */
#ifndef DD_RECALL_H
#define DD_RECALL_H

#include "delta/chat.h"

typedef struct dd_recall dd_recall;

dd_recall *dd_recall_new(void); /* NULL: out of memory */
void dd_recall_free(dd_recall *r);

typedef struct dd_sampled {
    delta_str text; /* behind the generation prompt, to the end of the turn */
    const uint32_t *ids;
    size_t n_ids; /* 0: not known */
    bool thought; /* its prompt left the think block open */
} dd_sampled;

/* The turn of these names (n >= 1). What it points to is copied. Where memory runs out it is not
 * kept. */
void dd_recall_put(dd_recall *r, uint32_t uid, const delta_str *names, size_t n,
                   const dd_sampled *turn);

/* The turn of exactly these names in this order, if it was this user's. What *ret_turn points to is
 * borrowed until the next put. */
bool dd_recall_find(dd_recall *r, uint32_t uid, const delta_str *names, size_t n,
                    dd_sampled *ret_turn);

#endif
