/* session.h -- one sequence of tokens, and the model state behind it.
 *
 * A session is an append-only timeline: tokens appended by the caller and
 * tokens sampled by the engine. It holds one DeltaNet state slot and the KV
 * pages of its length. Nothing is computed here: delta_step() does the work.
 *
 * Ownership  the caller owns the session and frees it before the engine.
 * Threads    engine thread only, except delta_session_cancel(): any thread.
 * Units      lengths count tokens. */
#ifndef DELTA_SESSION_H
#define DELTA_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct delta_session delta_session; /* fields live in api/session.c */

/* Reserves a slot and pages for ctx_tokens (1 .. info.ctx_max). `user` comes
 * back in every event of this session.
 *   DELTA_EINVALID  ctx_tokens is out of range
 *   DELTA_EBUSY     no slot or too few pages now: the caller may queue and retry */
int delta_session_new(delta_engine *e, uint32_t ctx_tokens, void *user, delta_session **ret_s,
                      delta_error *err);

/* Makes room for ctx_tokens in all (no-op if there already is).
 * Same errors; on failure the session is as before. */
int delta_session_reserve(delta_session *s, uint32_t ctx_tokens, delta_error *err);

/* Appends tokens to the timeline; the next steps compute them (prefill). Not
 * while generating (DELTA_ESTATE). DELTA_ELIMIT if they do not fit the
 * reservation, DELTA_EINVALID for an id >= info.n_vocab. */
int delta_session_append(delta_session *s, const uint32_t *ids, size_t n, delta_error *err);

/* Starts sampling after the last token. The timeline must not be empty. The
 * parameters are checked and copied. max_tokens beyond the reservation is cut
 * to it (the session then finishes with LENGTH). */
int delta_session_generate(delta_session *s, const delta_sampling *sampling,
                           const delta_stopping *stopping, delta_error *err);

/* Ends a running generation or prefill at the next step boundary, with a
 * FINISHED event, reason CANCELLED. Tokens not computed yet are dropped from
 * the timeline. Any thread; idle sessions ignore it. */
void delta_session_cancel(delta_session *s);

/* A paused session gets no rows: its reader is slow. Others run on. */
void delta_session_pause(delta_session *s, bool paused);

/* The timeline; valid until the next call on s. */
const uint32_t *delta_session_tokens(const delta_session *s, size_t *ret_n);
size_t delta_session_computed(const delta_session *s); /* of them, in the state */
bool delta_session_busy(const delta_session *s);       /* prefill or generation pending */

void delta_session_free(delta_session *s); /* NULL is a no-op; also while running */

#ifdef __cplusplus
}
#endif
#endif
