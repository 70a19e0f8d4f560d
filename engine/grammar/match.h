/* match.h -- inside a grammar and a matcher; see delta/grammar.h for the contracts.
 *
 * A matcher is in one of four phases. In THINK and CONTENT any text may come,
 * and scan.h looks out for what ends it: "</think>", or a call. In RULES a set
 * of places in the automaton says what may come. ENDED is the end of the turn.
 *
 * A place is a node, two registers and a stack. Stacks and lists (the used
 * parameters, the keys of an object) are cells that are shared and made once
 * for each content, so that equal stacks are equal numbers. */
#ifndef DE_GRAMMAR_MATCH_H
#define DE_GRAMMAR_MATCH_H

#include <pthread.h>
#include <stdatomic.h>

#include "grammar/auto.h"
#include "grammar/scan.h"
#include "grammar/text.h"
#include "grammar/vocab.h"

/* ---- the cache of masks */

enum { DE_CACHE_TOUCH_MAX = 12 }; /* stacks are compared so deep, or whole */

typedef struct de_cached {
    uint64_t hash[2];
    uint8_t touched; /* frames of the stacks that the mask depends on */
    bool used, recent;
} de_cached;

typedef struct de_cache {
    pthread_mutex_t lock; /* guards everything below */
    bool has_lock;
    de_cached *slots; /* [DELTA_GRAMMAR_CACHE_MASKS] */
    uint32_t *masks;  /* of each slot */
    uint32_t hand;
    uint32_t touches; /* bit t: some slot has touched == t */
    uint64_t n_masks, n_cached;
} de_cache;

struct delta_grammar {
    atomic_uint refs;
    delta_grammar_vocab *vocab;
    de_arena arena;
    de_auto a;
    de_scan_rules scan;
    bool thinking;
    bool free_content; /* CONTENT comes behind THINK, else RULES */
    bool watch_think;  /* "</think>" may not stand in content: the parser would drop it */
    uint32_t turn;     /* rule of the whole turn, behind the thinking */
    uint64_t compile_ns;
    de_cache cache;
};

/* ---- cells */

typedef struct de_cell {
    uint32_t parent; /* 0: none */
    uint32_t a, b;   /* a frame: the node to return to and its first register; lists: below */
    uint32_t chain;  /* of the hash table */
    uint32_t depth;  /* 1 + that of the parent */
} de_cell;

enum { /* b of cells that are no frames; registers stay below */
       DE_CELL_USED = 0xFFFFFFF1u,
       DE_CELL_BYTE = 0xFFFFFFF2u,
       DE_CELL_KEY = 0xFFFFFFF3u,
       DE_REGISTER_MAX = 0x7FFFFFFF,
};

typedef struct de_place {
    uint32_t node, stack, data, more;
} de_place;

typedef struct de_state {
    de_scan scan;
    uint8_t phase;
    uint8_t think;  /* RULES: bytes of "</think>" */
    bool accepting; /* RULES: the turn may end */
    uint16_t n;     /* RULES: places */
} de_state;

enum { DE_PHASE_THINK, DE_PHASE_CONTENT, DE_PHASE_RULES, DE_PHASE_ENDED };

enum {
    DE_RING = DELTA_MATCHER_ROLLBACK + 2, /* those, the current one, and one to try a token in */
    DE_TAIL_BYTES = 64,
    DE_RECURSION_FRAMES = 128, /* a rule that may call itself is not called in deeper stacks */
    DE_KEY_BYTES = 256,        /* of a free key, at most; */
    DE_KEY_ENOUGH = 192,       /* from here on one that may end does */
};

struct delta_matcher {
    delta_grammar *g;
    /* [RING] states, a ring; `at` is the current one, `past` of those before it are kept */
    de_state *ring;
    de_place *places; /* [RING][PLACES] */
    uint32_t at, past;
    char (*tails)[DE_TAIL_BYTES]; /* [RING]: the end of the text, for forced() */
    uint8_t *n_tail;

    de_cell *cells; /* [CELLS]; 0 is none */
    uint32_t *table;
    uint32_t n_cells, live_cells; /* live: after the last collection */
    uint32_t *renumber;           /* [CELLS], for that */

    /* for a walk over the trie */
    de_place *pool; /* sets, one behind the other */
    uint32_t cap_pool;
    uint32_t *scratch; /* a mask */
    uint32_t lowest;   /* the least depth of a frame that was looked at; 0: the bottom */
    bool keys;         /* a key was compared: not for the cache */
    bool accepting;    /* of the set made last */
    uint32_t visited;  /* nodes of tries */
};

/* A set in the making: places behind p[n_old]. */
typedef struct de_set {
    de_place *p;
    uint32_t n;
} de_set;

uint32_t de_cell_get(delta_matcher *m, uint32_t parent, uint32_t a, uint32_t b); /* 0: full */
void de_cells_drop(delta_matcher *m, uint32_t n); /* all but the first n */

/* out: room for PLACES. The places that byte leads to; m->accepting is set. */
uint32_t de_step(delta_matcher *m, const de_place *in, uint32_t n, uint8_t byte, de_place *out);
/* p[0] and where it leads without reading, but for itself. */
uint32_t de_spread_exits(delta_matcher *m, de_place *p);
/* The places at the start of a rule that nothing called. */
uint32_t de_start(delta_matcher *m, uint32_t rule, de_place *out);
/* One byte of text in any phase; false: not allowed, *s and p are spoilt. */
bool de_state_step(delta_matcher *m, de_state *s, de_place *p, de_place *spare, uint8_t byte);
bool de_state_accepting(const delta_matcher *m, const de_state *s);

static inline de_state *de_now(const delta_matcher *m)
{
    return &m->ring[m->at];
}
static inline de_place *de_places(const delta_matcher *m)
{
    return m->places + (size_t)m->at * DELTA_MATCHER_PLACES;
}

/* Nothing that comes next can be wrong: no mask is needed. */
bool de_state_free(const delta_matcher *m, const de_state *s);
/* Is this place in free text with nothing pending (at the border of two characters, or in one)? */
bool de_text_sliced(const delta_matcher *m, const de_place *p);
/* Is it at the border of two characters? */
bool de_text_between(const delta_matcher *m, const de_place *p);

int de_cache_init(de_cache *c, uint32_t words);
void de_cache_done(de_cache *c);

#endif
