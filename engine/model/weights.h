/* weights.h -- the directory of a checkpoint's shards: strict safetensors.
 *
 * Reads headers only; data is read by de_weights_read() with pread into the
 * caller's buffers (never mapped: a truncated file must be an error, not a
 * SIGBUS). Pure parsing in de_weights_parse_header(), which is fuzzed.
 *
 * Limits     header 16 MB a shard, 1,000 shards, 1 M tensors, rank 5,
 *            names of 256 bytes, an index of 64 MB.
 * Threads    immutable after opening; de_weights_read() from any thread. */
#ifndef DE_WEIGHTS_H
#define DE_WEIGHTS_H

#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "delta/error.h"

enum de_dtype { DE_F32, DE_F16, DE_BF16, DE_I64, DE_I32, DE_U8, DE_I8 };
size_t de_dtype_bytes(enum de_dtype d);
const char *de_dtype_name(enum de_dtype d); /* "BF16" */

enum { DE_MAX_RANK = 5 };

typedef struct de_tensor {
    const char *name; /* owned by the directory */
    enum de_dtype dtype;
    uint32_t rank;
    uint64_t dims[DE_MAX_RANK];
    uint32_t shard;
    uint64_t offset, bytes; /* in the shard's file */
} de_tensor;

typedef struct de_weights de_weights;

/* The JSON header of one file with data_bytes of data behind it: pure, for fuzzing. *ret_tensors is
 * malloc'ed, in order of offset (counted from the start of the data); names live in the arena. */
int de_weights_parse_header(de_arena *names, const char *text, size_t len, uint64_t data_bytes,
                            de_tensor **ret_tensors, size_t *ret_n, delta_error *err);

/* DIR/model.safetensors.index.json and its shards, or DIR/model.safetensors. A
 * model_mtp.safetensors beside an index must be named in it. Checks: header
 * length and JSON, dtypes, dims * size == data_offsets length, no overlap, no hole, offsets within
 * the file, index and headers agree. All faults name file and tensor. */
int de_weights_open(const char *dir, de_weights **ret_w, delta_error *err);
void de_weights_free(de_weights *w);

size_t de_weights_count(const de_weights *w);
const de_tensor *de_weights_at(const de_weights *w, size_t i);
const de_tensor *de_weights_find(const de_weights *w, const char *name); /* hashed */
const char *de_weights_shard_path(const de_weights *w, uint32_t shard);

/* Reads len bytes at `offset` of the shard's file. DELTA_EIO names the file. */
int de_weights_read(const de_weights *w, uint32_t shard, uint64_t offset, void *dst, size_t len,
                    delta_error *err);

#endif
