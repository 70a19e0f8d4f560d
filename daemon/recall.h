/* recall.h -- what was sampled, by the ids of its tool calls.
 *
 * Clients send an answer back in their own spelling: keys in another order, 1.0 for 1, the reasoning
 * left out. Rendered from that the prompt would differ from what the model wrote, and nothing
 * computed before could be used again. The ids of the calls are the one thing that comes back as it
 * went out, and nobody can guess them: who sends an answer's ids gets its bytes.
 *
 * Limits     DD_RECALL_TURNS turns, DD_RECALL_BYTES; a quarter of both for one user, whose oldest
 *            goes first. DD_RECALL_TURN_BYTES of one turn, longer ones are not kept.
 * Threads    the loop. */
#ifndef DD_RECALL_H
#define DD_RECALL_H

#include "delta/chat.h"

typedef struct dd_recall dd_recall;

dd_recall *dd_recall_new(void); /* NULL: out of memory */
void dd_recall_free(dd_recall *r);

/* The turn that had these calls (n >= 1). thought: its prompt left the think block open. Where
 * memory runs out it is not kept. */
void dd_recall_put(dd_recall *r, uint32_t uid, const delta_str *ids, size_t n, delta_str sampled,
                   bool thought);

/* The turn whose calls are m's, all of them in order, if it was this user's. ret_sampled is borrowed
 * until the next put. */
bool dd_recall_find(dd_recall *r, uint32_t uid, const delta_message *m, delta_str *ret_sampled,
                    bool *ret_thought);

#endif
