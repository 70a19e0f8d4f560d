/* tokenizer.h -- the tables behind a delta_tokenizer, shared by its four files:
 * vocab.c reads them, pretok.c splits text, bpe.c merges a piece, stream.c
 * turns bytes back into characters.
 *
 * Everything but `whole` is immutable after opening. `whole` is a cache of
 * answers that are the same whoever computes them, written with relaxed atomics. */
#ifndef DE_TOKENIZER_H
#define DE_TOKENIZER_H

#include <stdatomic.h>

#include "base/utf8.h"
#include "delta/tokenizer.h"

enum { DE_TOKENS_MAX = 1 << 20, DE_CODEPOINTS = 0x110000 };

/* What the split pattern tells apart. Without marks in the pattern they are OTHER. */
enum de_class { DE_OTHER, DE_LETTER, DE_MARK, DE_NUMBER, DE_SPACE };

typedef struct de_added {
    const char *text;
    size_t len;
    uint32_t id;
} de_added;

typedef struct de_merge {
    uint64_t pair; /* left << 32 | right; UINT64_MAX: free */
    uint32_t rank, id;
} de_merge;

struct delta_tokenizer {
    uint32_t n;          /* ids below this */
    uint8_t *bytes;      /* all tokens' bytes */
    uint32_t *begin;     /* [n + 1]: token i is bytes[begin[i] .. begin[i + 1]) */
    uint8_t *kind;       /* [n] enum delta_token_kind */
    atomic_uchar *whole; /* [n]: does the piece with these bytes become this token? 0: not known */
    uint32_t *by_text;   /* hash table of ordinary tokens: id + 1 */
    size_t by_text_size;
    de_merge *merges; /* hash table */
    size_t merges_size;
    uint32_t byte_id[256];
    de_added *added; /* by first byte, then falling length */
    uint32_t n_added;
    uint32_t added_first[257]; /* of each first byte, in added */
    uint8_t *classes;          /* [DE_CODEPOINTS] enum de_class */
};

/* The id of the ordinary token with exactly these bytes, or -1. */
int64_t de_token_find(const delta_tokenizer *t, const uint8_t *p, size_t n);
/* Rank and result of merging two tokens; NULL if they do not merge. */
const de_merge *de_merge_find(const delta_tokenizer *t, uint32_t left, uint32_t right);

/* End of the piece that begins at p < end (valid UTF-8). */
const uint8_t *de_piece_end(const delta_tokenizer *t, const uint8_t *p, const uint8_t *end);

/* A growing list of ids; failed sticks. */
typedef struct de_ids {
    uint32_t *p;
    size_t n, cap;
    bool failed;
} de_ids;
void de_ids_add(de_ids *ids, uint32_t id);
/* Appends the ids of one piece. */
void de_bpe(const delta_tokenizer *t, const uint8_t *p, size_t n, de_ids *ids);

/* Decodes the valid UTF-8 character at p and steps over it. */
static inline uint32_t de_utf8_next(const uint8_t **p)
{
    const uint8_t *s = *p;
    if (s[0] < 0x80) {
        *p = s + 1;
        return s[0];
    }
    if (s[0] < 0xE0) {
        *p = s + 2;
        return (s[0] & 31u) << 6 | (s[1] & 63u);
    }
    if (s[0] < 0xF0) {
        *p = s + 3;
        return (s[0] & 15u) << 12 | (s[1] & 63u) << 6 | (s[2] & 63u);
    }
    *p = s + 4;
    return (s[0] & 7u) << 18 | (s[1] & 63u) << 12 | (s[2] & 63u) << 6 | (s[3] & 63u);
}

#endif
