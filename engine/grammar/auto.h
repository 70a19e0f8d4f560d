/* auto.h -- the automaton of a grammar: states that read bytes, call rules and remember a little.
 *
 * A rule is a deterministic automaton over bytes whose states may also call
 * other rules; the matcher keeps the stack of calls. What regular rules cannot
 * say, or only with very many states, has kinds of state of its own: counted
 * repetition, the parameters of a call in any order, keys of an object that
 * may not repeat, strings with a bounded length, and values that end by the
 * output parser's rule (text.h).
 *
 * Expressions are made first (de_expr, in the arena), then a rule from each:
 * Thompson's construction, subsets, states that lead nowhere cut off.
 *
 * Threads    one at a time while building, immutable afterwards.
 * Limits     DELTA_GRAMMAR_NODES and _BYTES; `code` sticks once one was met. */
#ifndef DE_GRAMMAR_AUTO_H
#define DE_GRAMMAR_AUTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "delta/grammar.h"

#define DE_MANY UINT32_MAX /* no upper bound */

enum de_node_kind {
    DE_NODE_PLAIN,
    DE_NODE_COUNT,  /* arg: counts[]; register: how many so far */
    DE_NODE_PARAMS, /* arg: tools[]; register: list of the parameters that were used */
    DE_NODE_TEXT,   /* arg: texts[]; registers: state of the text automaton, characters */
    DE_NODE_STRING, /* arg: strings[]; inside a JSON string; second register: characters */
    DE_NODE_MEMBER, /* arg: objects[]; between the members of free keys; register: list of keys */
    DE_NODE_KEY,    /* arg: objects[]; inside a free key; registers: list of keys, this key */
};

enum {
    DE_NODE_ACCEPT = 1,  /* the rule may end here */
    DE_NODE_BETWEEN = 2, /* STRING, KEY: a character begins with the next byte */
    DE_NODE_NEUTRAL =
        4,            /* STRING, KEY: any text of the JSON slice may follow and comes back here */
    DE_NODE_DEAD = 8, /* nothing that follows can end the rule */
    DE_NODE_RECURSIVE = 16, /* a start: the rule may call itself; not too deep */
};

typedef struct de_edge {
    uint8_t lo, hi;
    uint32_t to;
} de_edge;

typedef struct de_call {
    uint32_t rule, ret; /* the node to go on at */
} de_call;

typedef struct de_node {
    uint8_t kind, flags;
    uint16_t n_edges;
    uint32_t n_calls;
    uint32_t edges, calls; /* first of them; edges by rising byte */
    uint32_t arg;
    uint32_t wide; /* 1 + index in wides[], or 0 */
} de_node;

/* first (next)*, min to max of them in all */
typedef struct de_count {
    uint32_t first, next; /* rules */
    uint32_t min, max;
} de_count;

typedef struct de_string {
    uint32_t min, max; /* characters */
} de_string;

/* What is known of the masks of a node whose own rule lets very many tokens pass.
 * Where tokens leave the rule: at this node of it, with this byte, to that node of the trie. */
typedef struct de_wide_exit {
    uint32_t node, child;
    uint8_t byte;
} de_wide_exit;

typedef struct de_wide {
    uint32_t *inside;    /* mask: tokens that stay in the rule from end to end */
    de_wide_exit *exits; /* by node, then byte */
    uint32_t n_exits;
} de_wide;

/* Members of an object with keys that are not declared: key : value. */
typedef struct de_object {
    uint32_t value;         /* rule: what stands behind a key, from the colon on */
    uint32_t space;         /* rule */
    uint32_t key_node;      /* where a key begins, behind its quote */
    uint32_t quote_node;    /* before the quote */
    uint32_t next_node;     /* behind a member */
    const delta_str *names; /* keys that are not free */
    uint32_t n_names;
    uint32_t min, max; /* members */
} de_object;

typedef struct de_names de_names; /* text.h */
typedef struct de_nfa de_nfa;     /* below */

typedef struct de_param_rule {
    delta_str name;
    uint32_t rule; /* from "<parameter=" on, to behind its closer */
    bool required;
} de_param_rule;

typedef struct de_call_tool {
    delta_str name;
    bool allowed;
    de_param_rule *params;
    uint32_t n_params;
    de_names *names;        /* of the parameters: those that end an unclosed value */
    uint32_t body;          /* rule: behind "<function=NAME>" to "</function>" */
    uint32_t wrapped, bare; /* rules: from there to the end of the turn */
} de_call_tool;

typedef struct de_text_info {
    uint32_t min, max; /* characters */
    uint32_t tail;     /* node: behind "</parameter>" */
    bool no_nested;    /* the text may not begin as an object, array or quoted string would */
} de_text_info;

typedef struct de_auto {
    de_arena *arena;
    int code; /* 0, or why building failed */
    uint64_t deadline_ns;
    de_node *nodes;
    de_edge *edges;
    de_call *calls;
    uint32_t *rules; /* start node of each; UINT32_MAX: not made yet */
    de_count *counts;
    de_string *strings;
    de_object *objects;
    de_text_info *texts;
    de_call_tool *tools;
    de_wide *wides;
    uint32_t n_nodes, n_edges, n_calls, n_rules, n_counts, n_strings, n_objects, n_texts, n_tools,
        n_wides;
    uint32_t cap_nodes, cap_edges, cap_calls, cap_rules, cap_counts, cap_strings, cap_objects,
        cap_texts, cap_wides;
} de_auto;

void de_auto_init(de_auto *a, de_arena *arena, uint64_t deadline_ns);
void de_auto_done(de_auto *a); /* not the arena */
/* Looks at the clock; false once something failed. */
bool de_auto_ok(de_auto *a);

/* ---- expressions */

enum de_expr_kind {
    DE_EXPR_NEVER,
    DE_EXPR_BYTES, /* these bytes as they are */
    DE_EXPR_CHARS, /* one character of ranges */
    DE_EXPR_SEQ,
    DE_EXPR_ALT,
    DE_EXPR_REPEAT, /* the child, min to max times */
    DE_EXPR_CALL,
};

typedef struct de_range {
    uint32_t lo, hi; /* code points */
} de_range;

typedef struct de_expr de_expr;
struct de_expr {
    enum de_expr_kind kind;
    uint32_t min, max;
    uint32_t rule;
    delta_str bytes;
    const de_range *ranges; /* sorted, apart, no surrogates */
    uint32_t n_ranges;
    de_expr *child, *last, *next;
};

/* All may return NULL when memory runs out; all take NULL and give NULL. */
de_expr *de_expr_bytes(de_auto *a, const char *p,
                       size_t len);                     /* p must live as long as the arena */
de_expr *de_expr_literal(de_auto *a, const char *text); /* of a C string */
de_expr *de_expr_chars(de_auto *a, const de_range *r, uint32_t n); /* copied, sorted and joined */
de_expr *de_expr_list(de_auto *a, enum de_expr_kind kind);         /* empty SEQ or ALT */
de_expr *de_expr_add(de_expr *list, de_expr *e); /* e: fresh; returns list, or NULL */
de_expr *de_expr_repeat(de_auto *a, de_expr *e, uint32_t min, uint32_t max);
de_expr *de_expr_call(de_auto *a, uint32_t rule);
de_expr *de_expr_seq2(de_auto *a, de_expr *x, de_expr *y);
de_expr *de_expr_never(de_auto *a);

/* ---- rules */

/* How characters of CHARS are spelled. */
enum de_spelling {
    DE_SPELL_PLAIN, /* UTF-8 */
    DE_SPELL_JSON,  /* inside a JSON string: what must be escaped is, and so is '<' */
    DE_SPELL_KEY,   /* of a free key: what would have to be escaped, and '<', is left out */
    DE_SPELL_VALUE, /* inside a parameter's value: no '<', no NUL */
};

uint32_t de_rule_new(de_auto *a); /* to be made later; calls may name it before */
void de_rule_make(de_auto *a, uint32_t rule, const de_expr *e, enum de_spelling spelling);
/* A rule of one node of this kind. */
uint32_t de_rule_of_node(de_auto *a, enum de_node_kind kind, unsigned flags, uint32_t arg);
uint32_t de_rule_count(de_auto *a, uint32_t first, uint32_t next, uint32_t min, uint32_t max);

/* The rule from a nondeterministic automaton; ends f. */
void de_rule_make_nfa(de_auto *a, uint32_t rule, de_nfa *f, uint32_t start, uint32_t end);

/* Cuts off what leads nowhere. Then: does the rule match anything; is there a rule that calls itself
 * before it read a byte (its number, or UINT32_MAX)? */
void de_auto_trim(de_auto *a);
bool de_rule_matches(const de_auto *a, uint32_t rule);
uint32_t de_auto_left_recursion(de_auto *a); /* a rule, or UINT32_MAX; ENOMEM into a->code */

const de_edge *de_node_edge(const de_auto *a, const de_node *n, uint8_t byte); /* or NULL */

void *de_auto_grow(de_auto *a, void *p, uint32_t n, uint32_t *cap, size_t size);
#define DE_APPEND(a, field, ...)                                                                   \
    ((a)->field =                                                                                  \
         de_auto_grow((a), (a)->field, (a)->n_##field, &(a)->cap_##field, sizeof *(a)->field),     \
     (a)->code ? UINT32_MAX : ((a)->field[(a)->n_##field] = (__VA_ARGS__), (a)->n_##field++))

/* ---- automata for texts that are watched: nfa.c builds them for text.c and json.c too */

typedef struct de_nfa_edge {
    uint32_t to, next, rule;
    uint8_t kind, lo, hi;
} de_nfa_edge;

struct de_nfa {
    uint32_t *first; /* of each state */
    uint16_t *marks; /* bits that a subset takes over from its states */
    de_nfa_edge *edges;
    uint32_t n_states, n_edges, cap_states, cap_marks, cap_edges;
    de_auto *a; /* for limits and errors */
};

enum { DE_NFA_DIE = 0x8000 }; /* mark: a subset with it is left out */

uint32_t de_nfa_state(de_nfa *f, unsigned marks);
void de_nfa_epsilon(de_nfa *f, uint32_t from, uint32_t to);
void de_nfa_byte(de_nfa *f, uint32_t from, uint8_t lo, uint8_t hi, uint32_t to);
void de_nfa_text(de_nfa *f, uint32_t from, const char *text, uint32_t to);
void de_nfa_chars(de_nfa *f, uint32_t from, const de_range *r, uint32_t n, uint32_t to);
void de_nfa_expr(de_nfa *f, uint32_t from, const de_expr *e, enum de_spelling spelling,
                 uint32_t to);
void de_nfa_call(de_nfa *f, uint32_t from, uint32_t rule, uint32_t to);
void de_nfa_done(de_nfa *f);
/* Appends the subsets as nodes; the first is the start, its index is returned. accept: the NFA's last
 * state, or UINT32_MAX. ret_marks (may be NULL): malloc'ed, of each node. */
uint32_t de_nfa_subsets(de_nfa *f, uint32_t start, uint32_t accept, uint16_t **ret_marks);

#endif
