/* cache.h -- the third tier of the prefix cache: states on disk, while the engine runs and after it.
 *
 * States that nobody used for a while are written to a folder, with the model they are of: the shards'
 * names, sizes and times of change, the backend and its layouts. Whoever opens the folder with the
 * same model finds them, whatever ended the engine before; those of another model are left alone
 * until the room is needed. A state that was given up in memory is read again for a session that asks
 * for it (delta_session_fetch), while others take their steps, and has the same bits then.
 *
 * Two threads of its own write and read. The engine's copies to and from the device, a piece at a
 * time: one state, or 8 MB of pages.
 *
 * Threads    the engine's. Units: bytes, nanoseconds. */
#ifndef DELTA_CACHE_H
#define DELTA_CACHE_H

#include "delta/engine.h"
#include "delta/session.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct delta_cache_options {
    const char *folder;
    uint64_t max_bytes;
    uint64_t idle_ns; /* a state is written when nobody used it for so long */
    /* Called with things worth a log line; may be NULL. */
    void (*on_note)(void *arg, enum delta_note_level level, const char *text);
    void *arg;
} delta_cache_options;

/* Once, before there are sessions. An engine without a cache takes it and does nothing. Looks at the head
 * of every file, not at the states; those are checked when they are read.
 *   DELTA_EIO, DELTA_ELIMIT  the folder      DELTA_ENOMEM */
int delta_cache_open(delta_engine *e, const delta_cache_options *o, delta_error *err);

/* Between two steps: a few pieces each way. *ret_again_ns: when to call again where no step comes
 * before; UINT64_MAX without a third tier. 1: what was written or read has ended, and who was refused room may
 * have it now; 0: nothing of the kind.
 *   DELTA_EDEVICE */
int delta_cache_work(delta_engine *e, uint64_t *ret_again_ns, delta_error *err);

/* ---- saves: one session's state as a file of its own */

typedef struct delta_save {
    const char *path; /* replaced whole, or not at all: path + ".new" is written and renamed */
    const void *text; /* [text_bytes] the file's beginning, the caller's until it is saved */
    size_t text_bytes;
    uint64_t max_bytes; /* of the file */
} delta_save;

/* Where in a file with so much text the state begins. */
uint64_t delta_save_state_at(uint64_t text_bytes);

/* Begins to save the state of s, a session at rest, as far as it is kept: tokens, state, all pages.
 *   0  begun: one at a time, the end is delta_cache_saved()
 *   1  not yet: something else is written, or its state is on its way from the disk; ask again after
 *      delta_cache_work()
 *   DELTA_ESTATE     there is no third tier, or s is at work
 *   DELTA_ENOTFOUND  nothing of it is computed      DELTA_ELIMIT  max_bytes      DELTA_ENOMEM */
int delta_cache_save(delta_session *s, const delta_save *save, delta_error *err);
/* 1: still being written. 0, once: it is there, with so many tokens.
 *   DELTA_ELIMIT  the disk is full      DELTA_EIO      DELTA_ECANCELLED  its state was bad */
int delta_cache_saved(delta_engine *e, uint64_t *ret_bytes, uint32_t *ret_tokens, delta_error *err);

/* Reads all of the state at `at` of a save. Any thread, after delta_cache_open().
 *   DELTA_ENOTFOUND, DELTA_EIO, DELTA_ENOMEM
 *   DELTA_ESTATE   it is of another model, tokenizer or backend, both are named; or no third tier
 *   DELTA_EFORMAT  damaged; file and offset are named */
int delta_cache_check(const delta_engine *e, const char *path, uint64_t at, uint32_t *ret_tokens,
                      delta_error *err);
/* Sessions of this owner find it from now on, while it is there and up to 64 later ones. Errors as above. */
int delta_cache_adopt(delta_engine *e, const char *path, uint64_t at, uint64_t owner,
                      delta_error *err);

/* Before the end: writes what is not on disk yet, and waits for it. Errors are notes. */
void delta_cache_flush(delta_engine *e);

#ifdef __cplusplus
}
#endif
#endif
