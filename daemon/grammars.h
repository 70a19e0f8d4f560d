/* grammars.h -- compiled grammars, kept from request to request.
 *
 * An agent sends the same tools with every turn: what was compiled for one is found by its key
 * for the next. The tokenizer's vocabulary is read when the first grammar is asked for, so that a
 * daemon nobody asks starts no later for it.
 *
 * Threads    dd_grammars_get() and dd_grammars_stats(): any thread; compiling holds no lock, and two
 *            that want the same grammar at once may both compile it. The others: the loop.
 * Limits     DD_GRAMMARS grammars and DD_GRAMMAR_BYTES, the one used longest ago goes first. */
#ifndef DD_GRAMMARS_H
#define DD_GRAMMARS_H

#include "daemon/engine_thread.h"
#include "delta/grammar.h"

typedef struct dd_grammars dd_grammars;

typedef struct dd_grammar_stats {
    uint64_t compiled, found, refused; /* requests */
    uint64_t compile_ns;               /* of all that were compiled */
    uint64_t masks, masks_cached;      /* of the grammars that are kept */
    uint32_t kept;
    uint64_t kept_bytes;
} dd_grammar_stats;

dd_grammars *dd_grammars_new(void); /* NULL: out of memory */
void dd_grammars_free(dd_grammars *g);

/* The grammar of spec, with a reference for the caller. e must be ready. Errors are those of
 * delta_grammar_compile(). */
int dd_grammars_get(dd_grammars *g, const dd_engine *e, const delta_grammar_spec *spec,
                    delta_grammar **ret_g, delta_error *err);
void dd_grammars_stats(dd_grammars *g, dd_grammar_stats *ret_stats);

#endif
