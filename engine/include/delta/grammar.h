/* grammar.h -- what the model may write next: constrained output.
 *
 * A grammar says which bytes one assistant turn may consist of; a matcher is
 * one place in it; a mask says which tokens keep the matcher alive. Tokens are
 * looked at byte by byte, so they may span any border. docs/GRAMMAR.md has the
 * notation, the JSON schema subset, the limits and how it works.
 *
 *   vocab    once per tokenizer      immutable, any thread
 *   grammar  once per tool set/form  immutable, any thread, reference counted
 *   matcher  once per sequence       one thread at a time
 *
 * Ownership  a grammar keeps its vocabulary, a matcher its grammar: the caller
 *            may free them in any order. The tokenizer must outlive the vocabulary.
 * Threads    the cache of masks inside a grammar is shared by its matchers and
 *            guarded by a mutex of its own, held for one copy of a mask.
 * Memory     accept, mask and rollback allocate nothing: all is sized by
 *            delta_matcher_new(). Compiling and delta_matcher_forced() allocate.
 * Units      ids are token ids; bytes are bytes of output text. */
#ifndef DELTA_GRAMMAR_H
#define DELTA_GRAMMAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/chat.h"
#include "delta/error.h"
#include "delta/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- the vocabulary */

enum {
    DELTA_GRAMMAR_END_IDS = 16,     /* at most so many ids that end a turn */
    DELTA_GRAMMAR_TOKEN_BYTES = 512 /* longer tokens are never allowed by a mask */
};

typedef struct delta_grammar_vocab delta_grammar_vocab;

/* Reads every token of t. n_vocab is the width of the logits and of the masks, at least
 * delta_tokenizer_size(t); ids without a token are never allowed. Ordinary and added tokens match as
 * their bytes; special ones (<|im_end|>, ...) are never allowed, but for end_ids where the turn may
 * end. Some 0.1 s and 25 MB for 248,320 tokens.
 *   DELTA_EINVALID  an end id out of range, too many, or n_vocab too small
 *   DELTA_ENOMEM */
int delta_grammar_vocab_new(const delta_tokenizer *t, uint32_t n_vocab, const uint32_t *end_ids,
                            size_t n_end_ids, delta_grammar_vocab **ret_v, delta_error *err);
void delta_grammar_vocab_free(delta_grammar_vocab *v); /* NULL is a no-op */

/* n_vocab, and the 32-bit words of a mask: (n_vocab + 31) / 32. */
uint32_t delta_grammar_vocab_size(const delta_grammar_vocab *v);
uint32_t delta_grammar_mask_words(const delta_grammar_vocab *v);

/* ---- what a turn may be */

enum delta_content_form {
    DELTA_CONTENT_FREE,    /* any text */
    DELTA_CONTENT_JSON,    /* one JSON object, whatever is in it */
    DELTA_CONTENT_SCHEMA,  /* text: a JSON schema; one JSON value of it */
    DELTA_CONTENT_REGEX,   /* text: a regular expression that all of the content matches */
    DELTA_CONTENT_CHOICE,  /* choices: one of these strings */
    DELTA_CONTENT_GRAMMAR, /* text: rules in the notation of docs/GRAMMAR.md */
};

enum delta_call_form {
    DELTA_CALLS_NONE,     /* no call is looked for; content as its form says */
    DELTA_CALLS_AUTO,     /* free content; a call that is opened is held to its tool and schema */
    DELTA_CALLS_REQUIRED, /* at least one call, nothing but white space before it */
};

/* All of it is read during delta_grammar_compile() only. */
typedef struct delta_grammar_spec {
    bool thinking;           /* output begins inside an open think block: free up to </think> */
    bool calls_in_reasoning; /* as in delta_output_options: a call there ends reasoning */
    bool calls_in_fences;    /* as there: a call inside a fenced block counts */
    enum delta_content_form content; /* must be FREE unless calls is NONE */
    delta_str text;
    const delta_str *choices;
    size_t n_choices;
    enum delta_call_form calls;
    const delta_str *tools_json; /* as in delta_chat; with NONE they are not looked at */
    size_t n_tools;
    /* Names of the tools that may be called; none: all. A named tool_choice is REQUIRED with one
     * name here and parallel false. */
    const delta_str *allowed;
    size_t n_allowed;
    bool parallel; /* more than one call in the turn */
} delta_grammar_spec;

enum { /* budgets of one compilation; past them it fails with DELTA_ELIMIT */
       DELTA_GRAMMAR_TEXT_BYTES = 1 << 20, /* all texts of a spec together */
       DELTA_GRAMMAR_NODES = 1 << 20,      /* states */
       DELTA_GRAMMAR_BYTES = 256 << 20,    /* memory while compiling */
       DELTA_GRAMMAR_TIME_MS = 5000,       /* time, looked at now and then */
       DELTA_GRAMMAR_TOOLS = 512,          /* tools */
       DELTA_GRAMMAR_PARAMS = 256,         /* parameters of one tool */
       DELTA_GRAMMAR_CHOICES = 65536,      /* strings of a choice, values of an enum */
       DELTA_GRAMMAR_DEPTH = 64,           /* a schema's own nesting, a regular expression's */
       DELTA_GRAMMAR_SPACE = 32,           /* white space at a stretch where it means nothing */
       DELTA_GRAMMAR_CACHE_MASKS = 128,    /* masks that a grammar remembers; 4 MB at 248,320 */
};

typedef struct delta_grammar delta_grammar;

/* Compiles a spec; milliseconds for the tools of an agent, so better not on a thread that must not
 * wait. *ret_g has one reference.
 *   DELTA_EINVALID      the spec contradicts itself, or a text is malformed: where, and what is wrong
 *   DELTA_EUNSUPPORTED  a schema asks for what cannot be held: the JSON path and the keyword, as in
 *                       "tools[2].parameters.properties.when.uniqueItems: not supported"
 *   DELTA_ELIMIT        a budget above; DELTA_ENOMEM */
int delta_grammar_compile(const delta_grammar_vocab *v, const delta_grammar_spec *spec,
                          delta_grammar **ret_g, delta_error *err);
delta_grammar *delta_grammar_ref(delta_grammar *g); /* one more reference; returns g */
void delta_grammar_free(delta_grammar *g);          /* one less; NULL is a no-op */

/* 64 hex digits that two specs share only if they mean the same turn: the key for a cache. Needs no
 * compiling. hex: 65 bytes. DELTA_ENOMEM. */
int delta_grammar_key(const delta_grammar_spec *spec, char hex[65], delta_error *err);

typedef struct delta_grammar_stats {
    uint64_t compile_ns;
    uint32_t nodes;  /* states of the automaton */
    uint64_t bytes;  /* held by the grammar, cached masks included */
    uint64_t masks;  /* asked for, of all matchers, but for FREE ones */
    uint64_t cached; /* of these, answered by the cache */
} delta_grammar_stats;
void delta_grammar_stats_read(const delta_grammar *g, delta_grammar_stats *ret_s);

/* ---- a place in it */

enum {
    DELTA_MATCHER_ROLLBACK = 32, /* tokens that can be taken back */
    DELTA_MATCHER_PLACES = 256,  /* places a matcher can be in at once; more are dropped */
    DELTA_MATCHER_CELLS = 65536, /* nesting and keys that it can remember */
};

typedef struct delta_matcher delta_matcher;

int delta_matcher_new(delta_grammar *g, delta_matcher **ret_m, delta_error *err);
void delta_matcher_free(delta_matcher *m); /* NULL is a no-op */
void delta_matcher_reset(delta_matcher *m);

/* Takes tokens that were sampled or forced, in order. An end id where the turn may end, ends it.
 * 0: all taken. DELTA_EINVALID: ids[*ret_taken] is not allowed here; those before it are taken.
 * Special tokens that are no end ids pass where the mask is FREE, as no text at all. ret_taken may
 * be NULL. */
int delta_matcher_accept(delta_matcher *m, const uint32_t *ids, size_t n, size_t *ret_taken,
                         delta_error *err);
/* Takes the last n tokens back. DELTA_EINVALID if n is more than was taken or ROLLBACK. */
int delta_matcher_rollback(delta_matcher *m, size_t n, delta_error *err);

enum delta_mask_kind {
    DELTA_MASK_FREE, /* no constraint now: bits were not written, do without a mask */
    DELTA_MASK_SET,  /* bit i of bits says whether token i is allowed; at least one is */
    DELTA_MASK_DEAD, /* no token is allowed, or the turn is over: end the sequence. Bits are zero */
};
/* bits: delta_grammar_mask_words() words; bit i is bits[i / 32] >> (i % 32) & 1. */
enum delta_mask_kind delta_matcher_mask(delta_matcher *m, uint32_t *bits);

/* May the turn end here (are end ids allowed)? Has it? */
bool delta_matcher_is_accepting(const delta_matcher *m);
bool delta_matcher_is_ended(const delta_matcher *m);

/* The next tokens where only one text is possible, and these tokens are what the tokenizer makes of
 * that text whatever comes behind it: they may be taken without sampling. Nothing is taken here.
 * Returns how many were written to ids, at most max; 0 also where memory runs out. */
size_t delta_matcher_forced(delta_matcher *m, uint32_t *ids, size_t max);

#ifdef __cplusplus
}
#endif
#endif
