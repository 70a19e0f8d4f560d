/* record.h -- one state of the prefix cache as a file: what the third tier (store.h) is made of.
 *
 *   head; tokens [end - from]; zeros to 8; sums [n_pages + 1], of each page and of the state; zeros to
 *   4096; pages [n_pages]; the state
 *
 * in this machine's byte order. The record holds the tokens [from, end) and the pages that they touch,
 * whole; what is before `from` is in its parent, a record that ends there. The state comes last, so
 * that it can be cut off where only the pages are still needed. The head's sum covers all up to the
 * pages, which have sums of their own: a reader checks what it reads, when it reads it.
 *
 * Costs      192 bytes, 4 a token, 8 a page, and what is lost to the border of 4096.
 * Threads    pure functions: any thread. */
#ifndef DE_RECORD_H
#define DE_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/error.h"

enum {
    DE_RECORD_ALIGN = 4096,
    DE_RECORD_NAME = 96,
    DE_RECORD_TOKENS = 1 << 24, /* `end` is at most that */
};

/* What the states are of. Records of another kind are nothing to go on from. */
typedef struct de_record_kind {
    uint64_t model; /* hash of all that makes its numbers */
    uint64_t slot_bytes, page_bytes;
    uint64_t page_tokens;
    char name[DE_RECORD_NAME]; /* the same for people */
} de_record_kind;

typedef struct de_record_head {
    char magic[16];
    de_record_kind kind;
    uint64_t id, parent; /* parent 0: from is 0 */
    uint64_t owner;
    uint32_t from, end;
    uint64_t sum;
} de_record_head;

typedef struct de_record {
    de_record_head head;
    uint32_t first_page, n_pages;
    const uint32_t *tokens; /* [end - from], in the bytes that were parsed */
    const uint64_t *sums;   /* [n_pages + 1] */
    uint64_t pages_at, state_at, whole_bytes;
} de_record;

/* Fills what follows from ret->head's kind, from and end; false: no record can be like that. */
bool de_record_layout(de_record *r);
/* Bytes before the pages, as far as they mean something. */
size_t de_record_meta_bytes(const de_record *r);
/* The meta of r, with r->tokens and r->sums, to to [de_record_meta_bytes()]. */
void de_record_write(const de_record *r, uint8_t *to);
/* Looks at the first `n` bytes of a file, aligned to 8. 0: *ret_r is what they say. > 0: so many are
 * needed to tell. DELTA_EFORMAT: they are no record, or damaged. */
int64_t de_record_parse(const uint8_t *bytes, size_t n, de_record *ret_r, delta_error *err);

/* The sum of page i of r, or with i == n_pages of its state. */
uint64_t de_record_sum(const de_record_head *h, uint32_t i, const void *bytes, size_t n);

#endif
