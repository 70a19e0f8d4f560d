/* json.h -- strict, bounded JSON: text to a tree in an arena, and a writer.
 *
 * Why not a library: numbers keep their spelling (integers of any length and
 * "1.50" pass through untouched), objects keep the order of their keys, memory
 * comes from the caller's bounded arena, and the parser does not recurse.
 *
 * Accepted is RFC 8259 and nothing else: no comments, no trailing commas, no
 * control characters in strings, no lone surrogates, valid UTF-8 only, no NUL
 * bytes in the text, no duplicate keys, depth <= 64. "\u0000" may stand in a
 * value, whose length is n; a key with it is refused.
 *
 * Threads    a tree is immutable: any thread. */
#ifndef DE_JSON_H
#define DE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "delta/error.h"

enum { DE_JSON_DEPTH = 64 };

enum de_json_kind {
    DE_JSON_NULL,
    DE_JSON_FALSE,
    DE_JSON_TRUE,
    DE_JSON_NUMBER, /* text: its spelling */
    DE_JSON_STRING, /* text: decoded UTF-8, NUL-terminated */
    DE_JSON_ARRAY,
    DE_JSON_OBJECT,
};

typedef struct de_json de_json;
struct de_json {
    enum de_json_kind kind;
    uint32_t n;       /* children of an array or object; bytes of text */
    const char *text; /* number, string */
    const char *key;  /* if a member of an object: its name, NUL-terminated */
    uint32_t key_len;
    de_json *child;    /* first child */
    de_json *next;     /* next sibling */
    size_t begin, end; /* the bytes of the source it was read from */
};

/* Parses exactly one value (and white space). The tree, strings included,
 * lives in the arena; text may go. DELTA_EFORMAT with line and column,
 * DELTA_ENOMEM when the arena is full. */
int de_json_parse(de_arena *a, const char *text, size_t len, de_json **ret_v, delta_error *err);

/* Member of an object by name, or NULL (also if v is NULL or no object).
 * Linear; walk the children where there are many. */
const de_json *de_json_get(const de_json *v, const char *key);
bool de_json_is_string(const de_json *v, const char *text); /* NULL-safe equality */

/* NULL-safe conversions: true if v is of that kind and fits. */
bool de_json_u64(const de_json *v, uint64_t *ret);
bool de_json_double(const de_json *v, double *ret); /* finite */
bool de_json_bool(const de_json *v, bool *ret);

/* A growing text buffer; `failed` sticks once memory ran out. */
typedef struct de_text {
    char *p; /* malloc'ed, NUL-terminated once anything was added */
    size_t len, cap;
    bool failed;
} de_text;
void de_text_add(de_text *t, const char *bytes, size_t len);
void de_text_puts(de_text *t, const char *s);
void de_text_done(de_text *t);

/* "..." with the escapes JSON needs (\" \\ \n \r \t \b \f \u00XX); non-ASCII stays raw,
 * which is what Python's json.dumps(ensure_ascii=False) writes. _part leaves the quotes off. */
void de_json_write_string(de_text *t, const char *s, size_t len);
void de_json_write_string_part(de_text *t, const char *s, size_t len);
/* Writes v as Python's json.dumps(v, ensure_ascii=False) would after json.loads: separators
 * ", " and ": ", integers as spelled, other numbers as repr(float) writes them. compact: no
 * blanks and numbers as spelled. */
void de_json_write(de_text *t, const de_json *v, bool compact);

#endif
