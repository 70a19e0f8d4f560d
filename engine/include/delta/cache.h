/* cache.h -- the prefix cache over a restart: written at the end of one engine, read by the next.
 *
 * The file holds checkpoints: tokens, the state behind them and the pages of keys and values, and what
 * model they are of: the shards' names, sizes and times of change, the backend and its layouts. An
 * engine of another model, or another build's layout, takes nothing from it.
 *
 * Threads    the engine's. Units: bytes. */
#ifndef DELTA_CACHE_H
#define DELTA_CACHE_H

#include "delta/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct delta_cache_reader delta_cache_reader;

/* Writes what is kept to the file, up to max_bytes of it, parents before their children. The file is
 * replaced whole: one that cannot be written leaves the one before. *ret_n: checkpoints.
 *   DELTA_ELIMIT  the disk is full      DELTA_EIO      DELTA_ENOMEM      DELTA_EDEVICE */
int delta_cache_save(delta_engine *e, const char *path, uint64_t max_bytes, uint32_t *ret_n,
                     delta_error *err);

/* Opens a file for reading it in pieces between steps.
 *   DELTA_ENOTFOUND  there is none      DELTA_EFORMAT  it is none, or of another model
 *   DELTA_EIO, DELTA_ENOMEM */
int delta_cache_open(delta_engine *e, const char *path, delta_cache_reader **ret_r,
                     delta_error *err);
/* Takes up one checkpoint, if there is room that nobody has: 1. 0: there is no more, or no room.
 *   DELTA_EFORMAT  what follows is damaged      DELTA_EIO      DELTA_EDEVICE */
int delta_cache_read(delta_cache_reader *r, delta_error *err);
void delta_cache_close(delta_cache_reader *r); /* NULL is a no-op */

#ifdef __cplusplus
}
#endif
#endif
