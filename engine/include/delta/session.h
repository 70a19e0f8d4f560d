/* session.h -- one sequence of tokens, and the model state behind it.
 *
 * A session is a timeline: tokens appended by the caller and tokens sampled by
 * the engine. While it is resident it has a DeltaNet state slot and KV pages.
 * Nothing is computed here: delta_step() does the work.
 *
 * Ownership  the caller owns the session and frees it before the engine.
 * Threads    engine thread only, except delta_session_cancel(): any thread.
 * Units      lengths count tokens.
 *
 * The timeline has n tokens, `computed` of which are in the state. Appended
 * tokens are computed by the steps that follow, with the last one's logits
 * kept; a sampled token is computed when there is more to do. So after a
 * generation computed is n - 1: its last token, the stop token too, stays in
 * the timeline and is computed first when it goes on.
 *
 * The prefix cache. What was computed is kept: states at marks, where a session
 * was forked, and where one left the device, with the pages before them. A
 * session that becomes resident begins behind the longest prefix of its tokens
 * that is kept for its owner; only what follows is computed. The cache gives up
 * what is worth least when sessions need the room.
 *
 * A turn goes from the append or generate that finds the session idle to the
 * next FINISHED, or until all that was appended is computed; its times and its
 * count of cached tokens (those that were in the state when it began) are
 * reported with it. */
#ifndef DELTA_SESSION_H
#define DELTA_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/engine.h"
#include "delta/grammar.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct delta_session delta_session; /* fields live in api/session.c */
typedef struct delta_event delta_event;     /* step.h */

#define DELTA_OWNER_NONE UINT64_MAX /* finds nothing in the cache and leaves nothing there */
enum { DELTA_CACHE_CHUNK = 64 };    /* states at marks are kept at multiples of so many tokens */

/* An empty timeline, not resident. owner: whose prefixes it may find and leaves its own to. `user`
 * comes back in every event of this session. DELTA_ENOMEM. */
int delta_session_new(delta_engine *e, uint64_t owner, void *user, delta_session **ret_s,
                      delta_error *err);

/* Appends tokens to the timeline; the next steps compute them (prefill) if the reservation has room
 * for all of the timeline. Not while generating (DELTA_ESTATE). DELTA_ELIMIT if that were more than
 * info.ctx_max, DELTA_EINVALID for an id >= info.n_vocab, DELTA_ENOMEM. */
int delta_session_append(delta_session *s, const uint32_t *ids, size_t n, delta_error *err);

/* Asks that the state behind n_tokens of the timeline (at most its length), rounded down to a
 * multiple of 64, be kept when it is computed: where another timeline may part from this one. It
 * costs a slot of the cache, and no step. Every 4096 tokens there is one anyway. */
void delta_session_mark(delta_session *s, uint32_t n_tokens);

/* Makes it resident, if it is not, with room for ctx_tokens in all (1 .. info.ctx_max, at least
 * the timeline's length). Append what is known before: only then can it be found in the cache.
 * Once it is resident this only makes more room, or nothing.
 *   DELTA_EINVALID  ctx_tokens is out of range
 *   DELTA_EBUSY     too many sessions, no slot or too few pages now: the caller may queue and retry
 *   DELTA_ENOMEM
 *   DELTA_EDEVICE   the next step says it, too
 * On failure the session is as before. */
int delta_session_reserve(delta_session *s, uint32_t ctx_tokens, delta_error *err);
/* Whether it has a place on the device. */
bool delta_session_resident(const delta_session *s);

/* Before a reserve: whether the disk (cache.h) has more of the timeline than the memory. 1: it is on its
 * way; work delta_cache_work() and ask again. 0: nothing is to be waited for. DELTA_EBUSY: there is no room
 * for it now, as it may be for a reserve. */
int delta_session_fetch(delta_session *s);

/* How long the timeline may become, of which a part is reserved yet; 0, at first: the reservation. Of the
 * next delta_session_generate(). */
void delta_session_set_limit(delta_session *s, uint32_t ctx_tokens);
/* The reservation that a generation under such a limit needs to go on; it gets no rows before it has
 * that. 0: it has room for its next step. */
uint32_t delta_session_short(const delta_session *s);

/* Leaves the device, the state and the pages to the cache; the timeline stays, and a generation
 * goes on when there is room again: with the same bits, if what it left is still there, and that is
 * given up after what nobody waits for. No-op if it is not resident. */
void delta_session_park(delta_session *s);
/* Ends what was asked of a session that was parked, as a cancel that of a resident one; the events are
 * valid until the next step, or the next call of this. None if nothing was asked of it, or it is resident. */
void delta_session_abort(delta_session *s, const delta_event **ret_events, size_t *ret_n);

/* Shortens the timeline to its first n_tokens; the next reserve finds the best place to go on from.
 * What was appended and never computed goes first, where it is not resident.
 *   DELTA_ESTATE    it is at work
 *   DELTA_EINVALID  it has fewer tokens */
int delta_session_rewind(delta_session *s, uint32_t n_tokens, delta_error *err);

/* A new session with the same timeline, not resident, and with the logits of the last token, if
 * they are there: it can generate without computing anything.
 *   DELTA_ESTATE    it is at work
 *   DELTA_ENOMEM */
int delta_session_fork(delta_session *s, void *user, delta_session **ret_s, delta_error *err);

/* Starts sampling after the last token. The parameters are checked and copied.
 * max_tokens beyond the reservation, or the limit, is cut to it (the session
 * then finishes with LENGTH).
 *   DELTA_ESTATE   the timeline is empty, it is not resident, a generation runs, or the last prefill
 *                  was cancelled or a row of logits was bad (append first)
 *   DELTA_ELIMIT   the reservation is full
 *   DELTA_EINVALID a parameter is out of range
 *   DELTA_ENOMEM   tables of penalties */
int delta_session_generate(delta_session *s, const delta_sampling *sampling,
                           const delta_stopping *stopping, delta_error *err);

/* What the next generation is held to besides its sampling. */
typedef struct delta_guide {
    bool thinking; /* the timeline ends in an open think block */
    /* Reasoning is closed after that many tokens, as the template would close it; 0: at once. Not
     * inside a character or an opened call. Nothing happens without `thinking`. */
    bool has_budget;
    uint32_t budget_tokens;
    /* What the turn may be, or NULL; a reference is taken. Tokens that only one text can go on with
     * come without a draw, several in one step where no log probabilities are asked for. min_tokens
     * does not hold where the grammar leaves nothing but the end. */
    delta_grammar *grammar;
} delta_guide;

/* For the next delta_session_generate() alone; NULL takes back what was said. The struct is copied.
 * A generation whose grammar leaves no token ends with ERROR.
 *   DELTA_ESTATE        a generation runs
 *   DELTA_ENOMEM        the grammar's place
 *   DELTA_EUNSUPPORTED  a budget, and the tokenizer has no </think> */
int delta_session_guide(delta_session *s, const delta_guide *g, delta_error *err);

/* Ends a running generation or prefill at the next step boundary, with a
 * FINISHED event, reason CANCELLED: a cancel during a step is honoured at that
 * step's end, before its tokens are sampled. Appended tokens that are not
 * computed by then are dropped from the timeline; sampled tokens stay, the last
 * one too. Text held back for a stop string is released first. Any thread;
 * idle sessions ignore it: what is appended or generated later runs. */
void delta_session_cancel(delta_session *s);

/* A session in the background gets the rows of steps that no other session wants. */
void delta_session_set_background(delta_session *s, bool background);

/* While a pinned session is not resident the state that it would go on from is given up after those of
 * all that are not pinned. */
void delta_session_set_pinned(delta_session *s, bool pinned);

/* A paused session gets no rows: its reader is slow. Others run on. */
void delta_session_pause(delta_session *s, bool paused);

/* The timeline; valid until the next call on s. */
const uint32_t *delta_session_tokens(const delta_session *s, size_t *ret_n);
/* Of the turn that runs or ran last: the tokens that were in the state when it began, and how many
 * tokens the timeline has in common with something kept, which had no state so far on. */
void delta_session_reuse(const delta_session *s, uint32_t *ret_cached, uint32_t *ret_shared);
size_t delta_session_computed(const delta_session *s); /* of them, in the state */
bool delta_session_busy(const delta_session *s);       /* prefill or generation pending */

void delta_session_free(delta_session *s); /* NULL is a no-op; also while running */

#ifdef __cplusplus
}
#endif
#endif
