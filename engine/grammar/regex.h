/* regex.h -- regular expressions to expressions of the automaton.
 *
 * The subset that ECMAScript and Python agree on and that a finite automaton
 * can hold; docs/GRAMMAR.md lists it. Where the two differ on what a class
 * holds (\w, \d, \s beyond ASCII), it holds what both do.
 *
 * Threads    pure functions. Limits: DELTA_GRAMMAR_DEPTH groups in groups, DE_REPEAT_MAX times. */
#ifndef DE_GRAMMAR_REGEX_H
#define DE_GRAMMAR_REGEX_H

#include "grammar/auto.h"

enum { DE_REPEAT_MAX = 65535, DE_CLASS_RANGES = 256 };

/* A place in a text; at: what was read. */
typedef struct de_reader {
    de_auto *a;
    const char *s;
    size_t len, at;
    unsigned depth;
    delta_error *err;
} de_reader;

/* All of a text matches; search: some part of it does, as a schema's pattern means it. 0 or
 * DELTA_EINVALID with the offset, DELTA_EUNSUPPORTED naming the construct, or a->code. */
int de_regex_read(de_auto *a, const char *s, size_t len, bool search, de_expr **ret_e,
                  delta_error *err);

/* "[...]" at the reader, behind its bracket; "{m,n}", "?", "*", "+" behind e, if one is there.
 * NULL: the reader's err says why. */
de_expr *de_class_read(de_reader *r);
de_expr *de_repeat_read(de_reader *r, de_expr *e);
/* One character, UTF-8; false at the end or if it is none. */
bool de_char_read(de_reader *r, uint32_t *ret_c);
/* Behind a backslash: a character. */
bool de_escape_read(de_reader *r, uint32_t *ret_c);
de_expr *de_any_char(de_auto *a); /* all but line ends */

/* Least and most characters of what it matches (calls count as none, most is DE_MANY then). */
void de_expr_lengths(const de_expr *e, uint32_t *ret_min, uint32_t *ret_max);

#endif
