/* compile.h -- the parts of a compilation: schemas, calls, and masks known beforehand.
 *
 * Threads    one compilation is one thread's; nothing is shared between them. */
#ifndef DE_GRAMMAR_COMPILE_H
#define DE_GRAMMAR_COMPILE_H

#include "grammar/json.h"
#include "grammar/match.h"

/* A text of the spec as JSON; where: for errors. */
int de_spec_json(delta_grammar *g, delta_str text, const char *where, de_json **ret_v,
                 delta_error *err);

/* A rule for JSON text of a schema. root: what "#/..." refers to; where: the path for errors. */
int de_schema_rule(de_json_rules *j, const de_json *root, const de_json *schema, const char *where,
                   uint32_t *ret_rule, delta_error *err);

/* A rule for a parameter's value, from behind "<parameter=NAME>\n" to behind its closer and newline. */
int de_schema_param_rule(de_json_rules *j, const de_json *root, const de_json *schema,
                         const char *where, uint32_t *ret_rule, delta_error *err);

/* Fills g->a.tools, g->scan and, for REQUIRED, g->turn. */
int de_calls_compile(delta_grammar *g, const delta_grammar_spec *spec, delta_error *err);

/* Finds the states that let very many tokens pass, and what is known of them; within the budgets. */
int de_wides_make(delta_grammar *g, delta_error *err);

#endif
