/* batch.h -- what one forward needs to know: rows, sequences, pages, slots.
 *
 * A batch is a list of rows (token, position, sequence). The rows of one
 * sequence are consecutive, in order, and continue its cached length. One
 * forward serves sequences in prefill and in decode at once.
 *
 * Results of a sequence do not depend on the others in the batch. They depend
 * on how its own tokens were cut into forwards only where a cut is not at a
 * multiple of DE_CHUNK positions, so the planner cuts prefill only there
 * (or at the end of what was appended). */
#ifndef DE_BATCH_H
#define DE_BATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/top_logits.h"

enum {
    DE_PAGE = 64,  /* tokens of one KV page */
    DE_CHUNK = 64, /* tokens of one chunk of the chunked delta rule */
};

/* The state behind `end` tokens of a sequence goes to a slot of its own, too: a checkpoint that costs a
 * copy, no forward. start < end <= start + n_rows, a multiple of DE_CHUNK: so no bit of the rows
 * depends on whether there is a mark. With marks n_out <= 1. */
typedef struct de_batch_mark {
    uint32_t end, slot;
} de_batch_mark;

typedef struct de_batch_seq {
    uint32_t row, n_rows;       /* rows [row, row + n_rows) */
    uint32_t start;             /* tokens already in the cache = sequence index of the first row */
    const uint32_t *pages;      /* page ids; enough for start + n_rows tokens */
    uint32_t slot;              /* state slot */
    bool decode;                /* one row, computed the way of decode: see docs/NUMERICS.md */
    uint32_t first_out, n_out;  /* of its rows, the last n_out get logits, at out[first_out ..] */
    bool wants_top;             /* the first in rank will do (de_batch.tops) */
    const de_batch_mark *marks; /* [n_marks], rising */
    uint32_t n_marks;
} de_batch_seq;

typedef struct de_batch {
    uint32_t n_rows, n_seqs, n_out;
    const uint32_t *tokens;   /* [n_rows] */
    const uint32_t (*pos)[3]; /* [n_rows] rotary positions t, h, w (equal for text) */
    const de_batch_seq *seqs; /* [n_seqs] */
    /* [n_out], or NULL. Written for outputs of sequences that want it, in place of their logits, by backends that can: the first in
     * rank of ids below n_ids. The caller has set n to 0. */
    de_top_logits *tops;
    uint32_t n_ids;
} de_batch;

#endif
