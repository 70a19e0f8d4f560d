/* vocab.h -- the vocabulary as tries of bytes, and the parts of it that are allowed wholesale.
 *
 * A mask is made by walking the trie with the automaton, a subtree given up at
 * its first forbidden byte. Where nearly everything is allowed (free text, the
 * inside of a JSON string) that walk would see all tokens; there a slice helps:
 * the tokens that stay inside such text, known beforehand, and a small trie of
 * the rest that must be looked at.
 *
 * Threads    immutable after delta_grammar_vocab_new(), but for the count of references. */
#ifndef DE_GRAMMAR_VOCAB_H
#define DE_GRAMMAR_VOCAB_H

#include <stdatomic.h>

#include "delta/grammar.h"
#include "grammar/text.h"

/* Preorder: the first child of i is i + 1 unless that is skip. Node 0 is the root, node n a sentinel. */
typedef struct de_trie_node {
    uint32_t skip;   /* the next node that is not below this one */
    uint32_t rank;   /* first of the tokens at and below it, in order[] */
    uint16_t n_here; /* of these, how many end here */
    uint16_t depth;  /* bytes from the root */
    uint8_t byte;    /* of the edge that leads here */
} de_trie_node;

typedef struct de_trie {
    de_trie_node *nodes; /* [n + 1] */
    uint32_t n;
    uint32_t *order; /* token ids, sorted by their bytes */
    uint32_t n_order;
} de_trie;

enum { DE_SLICE_SHORT = 16 }; /* masks by length are kept up to so many characters */

/* Tokens that are text of one sort from end to end, by how many characters they begin. */
typedef struct de_slice {
    uint32_t *all;                      /* mask */
    uint32_t *upto[DE_SLICE_SHORT + 1]; /* masks: of at most k characters; [0] is NULL */
    uint32_t *ids;                      /* sorted by characters */
    uint16_t *last;                     /* of each: where its last character begins */
    uint32_t *begin;                    /* [max_chars + 2]: those with k characters, in ids */
    uint32_t *lines;                    /* those that end in a newline */
    uint16_t *line_chars;
    uint32_t n_lines;
    uint32_t max_chars;
    de_trie
        rest; /* tokens that begin as such text and go on as something else that may be allowed */
} de_slice;

enum de_slice_kind {
    DE_SLICE_TEXT, /* UTF-8 without NUL and '<'; rest: with '<' */
    DE_SLICE_JSON, /* inside a JSON string: no escapes, quotes, call's tags; rest: with them */
    DE_SLICE_N
};

struct delta_grammar_vocab {
    atomic_uint refs;
    const delta_tokenizer *tok;
    uint32_t n_vocab, words;
    uint32_t end_ids[DELTA_GRAMMAR_END_IDS];
    uint32_t n_end_ids;
    de_trie trie;     /* all ordinary and added tokens */
    uint32_t *text;   /* mask of these */
    uint32_t longest; /* bytes of the longest of them */
    de_slice slice[DE_SLICE_N];
    de_text_auto text_auto;
    bool has_long_tags;  /* some token holds "<function=" and another tag */
    uint32_t *think_ids; /* tokens that hold "</think>" */
    uint32_t n_think_ids;
};

delta_grammar_vocab *de_vocab_ref(const delta_grammar_vocab *v);
bool de_vocab_is_end(const delta_grammar_vocab *v, uint32_t id);

static inline void de_bit_set(uint32_t *bits, uint32_t i)
{
    bits[i / 32] |= UINT32_C(1) << (i % 32);
}
static inline void de_bit_clear(uint32_t *bits, uint32_t i)
{
    bits[i / 32] &= ~(UINT32_C(1) << (i % 32));
}
static inline bool de_bit(const uint32_t *bits, uint32_t i)
{
    return bits[i / 32] >> (i % 32) & 1;
}

/* The child of node i by this byte, or UINT32_MAX. */
uint32_t de_trie_child(const de_trie *t, uint32_t i, uint8_t byte);
/* The node that len bytes below node i lead to, or UINT32_MAX. */
uint32_t de_trie_find(const de_trie *t, uint32_t i, const void *bytes, size_t len);

#endif
