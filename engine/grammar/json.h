/* json.h -- rules for JSON text: strings, numbers, any value.
 *
 * White space is allowed where JSON allows it, but only so much of it
 * (DELTA_GRAMMAR_SPACE), and none before or behind the whole. Strings are valid
 * UTF-8, escapes of surrogates are left out (such characters are written as
 * they are). Keys that are not declared have no escapes and do not repeat.
 *
 * Inside a call's parameter no string may hold "</parameter>", "</function>" or
 * "</tool_call>" as such: the parser would see tags. `in_call` says which. */
#ifndef DE_GRAMMAR_JSON_H
#define DE_GRAMMAR_JSON_H

#include "base/json.h"
#include "grammar/auto.h"

enum { DE_ANY_DEPTH = 24 }; /* of values that no schema describes */

typedef struct de_json_rules {
    de_auto *a;
    bool in_call;
    /* made when asked for; UINT32_MAX: not yet */
    uint32_t space, string, number, integer, any[DE_ANY_DEPTH + 1];
} de_json_rules;

void de_json_rules_init(de_json_rules *j, de_auto *a, bool in_call);

uint32_t de_json_space(de_json_rules *j);
uint32_t de_json_string(de_json_rules *j, uint32_t min, uint32_t max); /* with its quotes */
uint32_t de_json_number(de_json_rules *j);
uint32_t de_json_integer(de_json_rules *j);
uint32_t de_json_any(de_json_rules *j);        /* any value */
uint32_t de_json_any_object(de_json_rules *j); /* any object */
uint32_t de_json_any_array(de_json_rules *j);
/* Members with free keys, with what is between them, without the braces. *ret_next: the rule where
 * others came before. pattern: an expression that keys match, or NULL. names are not free; they must
 * live on. */
uint32_t de_json_members(de_json_rules *j, uint32_t value, const delta_str *names, uint32_t n_names,
                         const de_expr *pattern, uint32_t min, uint32_t max, uint32_t *ret_next);
/* A string or other value as it must be spelled. */
de_expr *de_json_literal(de_json_rules *j, const de_json *v);
de_expr *de_json_key(de_json_rules *j, delta_str name);

/* A number in lo .. hi (NULL: no bound; spelled as in JSON), its bounds in or out; decimals: digits
 * behind the point at most, 0 for integers, DE_MANY for any. NULL and *ret_why if it cannot be. */
typedef struct de_bounds {
    const char *lo, *hi;
    bool lo_open, hi_open;
    uint32_t decimals;
} de_bounds;
de_expr *de_number_between(de_auto *a, const de_bounds *b, const char **ret_why);
/* A multiple of k >= 1, without bounds: a rule. */
uint32_t de_integer_multiple(de_auto *a, uint32_t k);

#endif
