/* schema.h -- declared tools: names, parameters, and text to a JSON value by type.
 *
 * In the model's output every value is bare text; only the tool's JSON schema
 * says whether `5` is a number. From each schema we keep one set of types a
 * parameter, followed through $ref, anyOf, oneOf, allOf, type lists, enum and
 * const, and the names that other type systems give them.
 *
 * Ownership  tools live in the arena they were read into.
 * Threads    immutable after de_tools_read().
 * Limits     schemas are followed DE_SCHEMA_DEPTH references deep. */
#ifndef DE_CHAT_SCHEMA_H
#define DE_CHAT_SCHEMA_H

#include <stdbool.h>
#include <stddef.h>

#include "base/arena.h"
#include "base/json.h"
#include "delta/chat.h"

enum { DE_SCHEMA_DEPTH = 16 };

enum { /* a set of types; conversion tries them in this order */
       DE_TYPE_NULL = 1,
       DE_TYPE_INTEGER = 2,
       DE_TYPE_NUMBER = 4,
       DE_TYPE_BOOLEAN = 8,
       DE_TYPE_NESTED = 16, /* object or array */
       DE_TYPE_STRING = 32,
};

typedef struct de_param {
    delta_str name;
    unsigned types; /* never 0: what says nothing of its type is a string */
} de_param;

typedef struct de_tool {
    delta_str name;
    de_param *params;
    size_t n_params;
} de_tool;

typedef struct de_tools {
    de_tool *tools;
    size_t n_tools;
} de_tools;

/* {"type":"function","function":{"name", "parameters"}}, or the inner object alone.
 * DELTA_EINVALID with the index of the tool, DELTA_ENOMEM. */
int de_tools_read(de_arena *a, const delta_str *json, size_t n, de_tools *ret_t, delta_error *err);

const de_tool *de_tools_find(const de_tools *t, delta_str name);   /* or NULL */
const de_param *de_tool_param(const de_tool *t, delta_str name);   /* or NULL; t may be NULL */
bool de_tools_has_prefix(const de_tools *t, delta_str name_start); /* some name begins so */

/* Appends text as a JSON value of one of the types. If it is of none, or strings are all that
 * is allowed, as a string; false then, if strings were not allowed. */
bool de_value_write(de_text *out, delta_str text, unsigned types);

#endif
