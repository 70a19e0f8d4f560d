/* notation.h -- grammars as users write them; docs/GRAMMAR.md has the notation.
 *
 * Threads    pure. Limits: DELTA_GRAMMAR_DEPTH parentheses in parentheses, DE_NOTATION_RULES rules. */
#ifndef DE_GRAMMAR_NOTATION_H
#define DE_GRAMMAR_NOTATION_H

#include "grammar/auto.h"

enum { DE_NOTATION_RULES = 4096 };

/* Makes all rules; *ret_rule is `root`. 0, or DELTA_EINVALID with the line, or a->code. */
int de_notation_read(de_auto *a, const char *text, size_t len, uint32_t *ret_rule,
                     delta_error *err);

#endif
