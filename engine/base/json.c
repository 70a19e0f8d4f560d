/* json.c -- see json.h.
 *
 * The parser is a loop over an explicit stack of at most DE_JSON_DEPTH open
 * containers. Names of one object are compared through a hash table keyed with
 * an address that differs from run to run, so that chosen names cannot make it
 * slow. */
#include "base/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bits.h"
#include "base/utf8.h"

typedef struct parser {
    de_arena *arena;
    const char *text;
    size_t len, at;
    delta_error *err;
} parser;

/* ---- errors */

static int fail_at(const parser *p, size_t at, const char *what)
{
    size_t line = 1, column = 1;
    for (size_t i = 0; i < at && i < p->len; i++) {
        column++;
        if (p->text[i] == '\n') {
            line++;
            column = 1;
        }
    }
    return delta_fail(p->err, DELTA_EFORMAT, "JSON line %zu column %zu: %s", line, column, what);
}

static int no_memory(const parser *p)
{
    return delta_fail(p->err, DELTA_ENOMEM, "JSON: more than %zu bytes needed", p->arena->limit);
}

/* ---- strings */

static int hex4(const char *s, uint32_t *ret)
{
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) {
        char c = s[i];
        uint32_t d = c >= '0' && c <= '9'   ? (uint32_t)(c - '0')
                     : c >= 'a' && c <= 'f' ? (uint32_t)(c - 'a' + 10)
                     : c >= 'A' && c <= 'F' ? (uint32_t)(c - 'A' + 10)
                                            : 16;
        if (d > 15)
            return -1;
        v = v << 4 | d;
    }
    *ret = v;
    return 0;
}

/* Finds the end of the string whose opening quote is at p->at - 1; counts what it decodes to at
 * most. Checks everything but the escapes' meaning. */
static int scan_string(const parser *p, size_t *ret_end, bool *ret_plain)
{
    size_t i = p->at;
    bool plain = true;
    while (i < p->len) {
        unsigned char c = (unsigned char)p->text[i];
        if (c == '"') {
            *ret_end = i;
            *ret_plain = plain;
            return 0;
        }
        if (c == '\\') {
            plain = false;
            i += 2;
            continue;
        }
        if (c < 0x20)
            return fail_at(p, i, "control character in a string");
        size_t n = de_utf8_len(p->text + i, p->len - i);
        if (n == 0)
            return fail_at(p, i, "bad UTF-8");
        i += n;
    }
    return fail_at(p, p->at - 1, "string without an end");
}

/* One escape at p->text[*at] == '\\', not beyond end. */
static int read_escape(const parser *p, size_t *at, size_t end, char *out, size_t *out_len)
{
    size_t i = *at + 1; /* < end: scan_string() saw a character behind the backslash */
    char c = p->text[i++];
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *known = c ? strchr(names, c) : NULL;
    if (known) {
        out[(*out_len)++] = values[known - names];
        *at = i;
        return 0;
    }
    uint32_t u, low;
    if (c != 'u')
        return fail_at(p, *at, "unknown escape");
    if (end - i < 4 || hex4(p->text + i, &u) < 0)
        return fail_at(p, *at, "\\u needs four hex digits");
    i += 4;
    if (u >= 0xDC00 && u <= 0xDFFF)
        return fail_at(p, *at, "lone surrogate");
    if (u >= 0xD800 && u <= 0xDBFF) {
        if (end - i < 6 || p->text[i] != '\\' || p->text[i + 1] != 'u' ||
            hex4(p->text + i + 2, &low) < 0 || low < 0xDC00 || low > 0xDFFF)
            return fail_at(p, *at, "lone surrogate");
        i += 6;
        u = 0x10000 + ((u - 0xD800) << 10) + (low - 0xDC00);
    }
    *out_len += de_utf8_put(out + *out_len, u);
    *at = i;
    return 0;
}

/* The string whose opening quote was just read. */
static int read_string(parser *p, const char **ret_text, uint32_t *ret_len)
{
    size_t end;
    bool plain;
    int r = scan_string(p, &end, &plain);
    if (r < 0)
        return r;
    size_t raw = end - p->at, n = 0;
    if (raw > UINT32_MAX)
        return fail_at(p, p->at, "string too long");
    char *out = de_arena_alloc(p->arena, raw + 1); /* an escape never grows */
    if (!out)
        return no_memory(p);
    if (plain) {
        memcpy(out, p->text + p->at, raw);
        n = raw;
    } else {
        for (size_t i = p->at; i < end;) {
            if (p->text[i] == '\\') {
                r = read_escape(p, &i, end, out, &n);
                if (r < 0)
                    return r;
            } else {
                out[n++] = p->text[i++];
            }
        }
    }
    out[n] = 0;
    p->at = end + 1;
    *ret_text = out;
    *ret_len = (uint32_t)n;
    return 0;
}

/* ---- numbers */

static size_t digits(const parser *p, size_t i)
{
    while (i < p->len && p->text[i] >= '0' && p->text[i] <= '9')
        i++;
    return i;
}

static int read_number(parser *p, de_json *v)
{
    size_t start = p->at, i = start;
    if (p->text[i] == '-')
        i++;
    size_t d = digits(p, i);
    if (d == i || (p->text[i] == '0' && d > i + 1))
        return fail_at(p, start, "malformed number");
    i = d;
    if (i < p->len && p->text[i] == '.') {
        d = digits(p, i + 1);
        if (d == i + 1)
            return fail_at(p, start, "malformed number");
        i = d;
    }
    if (i < p->len && (p->text[i] == 'e' || p->text[i] == 'E')) {
        i++;
        if (i < p->len && (p->text[i] == '+' || p->text[i] == '-'))
            i++;
        d = digits(p, i);
        if (d == i)
            return fail_at(p, start, "malformed number");
        i = d;
    }
    if (i - start > UINT32_MAX)
        return fail_at(p, start, "number too long");
    v->kind = DE_JSON_NUMBER;
    v->n = (uint32_t)(i - start);
    v->text = de_arena_strndup(p->arena, p->text + start, i - start);
    p->at = i;
    return v->text ? 0 : no_memory(p);
}

/* ---- duplicate names */

static uint64_t hash_name(const char *s, size_t n, uint64_t h)
{
    for (; n >= 8; s += 8, n -= 8) {
        uint64_t w;
        memcpy(&w, s, 8);
        h = (h ^ w) * 0x9E3779B97F4A7C15u;
        h ^= h >> 29;
    }
    uint64_t w = n;
    for (size_t i = 0; i < n; i++)
        w = w << 8 | (unsigned char)s[i];
    h = (h ^ w) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}

static bool same_name(const de_json *a, const de_json *b)
{
    return a->key_len == b->key_len && memcmp(a->key, b->key, a->key_len) == 0;
}

static int fail_twice(const parser *p, const de_json *b)
{
    int r = fail_at(p, b->begin, "duplicate name in an object");
    if (b->key_len && b->key_len <= 200)
        delta_error_prefix(p->err, "%s", b->key);
    return r;
}

/* DELTA_EFORMAT if two members of the object have one name. */
static int check_names(const parser *p, const de_json *object)
{
    if (object->n <= 8) {
        for (const de_json *a = object->child; a; a = a->next)
            for (const de_json *b = a->next; b; b = b->next)
                if (same_name(a, b))
                    return fail_twice(p, b);
        return 0;
    }
    size_t cap = 16;
    while (cap < (size_t)object->n * 2)
        cap *= 2;
    const de_json **slots = calloc(cap, sizeof *slots);
    if (!slots)
        return no_memory(p);
    int r = 0;
    const uint64_t seed = (uint64_t)(uintptr_t)slots ^ (uint64_t)(uintptr_t)p * 31;
    for (const de_json *a = object->child; a && r == 0; a = a->next) {
        size_t i = hash_name(a->key, a->key_len, seed) & (cap - 1);
        while (slots[i] && !same_name(slots[i], a))
            i = (i + 1) & (cap - 1);
        if (slots[i])
            r = fail_twice(p, a);
        slots[i] = a;
    }
    free(slots);
    return r;
}

/* ---- values */

static void skip_blanks(parser *p)
{
    while (p->at < p->len) {
        char c = p->text[p->at];
        if (c != ' ' && c != '\t' && c != '\n' && c != '\r')
            return;
        p->at++;
    }
}

static int read_word(parser *p, de_json *v, const char *word, enum de_json_kind kind)
{
    size_t n = strlen(word);
    if (p->len - p->at < n || memcmp(p->text + p->at, word, n) != 0)
        return fail_at(p, p->at, "expected a value");
    p->at += n;
    v->kind = kind;
    return 0;
}

/* Everything of a value but the members of a container, which is only opened. */
static int read_head(parser *p, de_json *v)
{
    v->begin = p->at;
    if (p->at >= p->len)
        return fail_at(p, p->at, "expected a value, found the end");
    char c = p->text[p->at];
    switch (c) {
    case '{':
    case '[':
        v->kind = c == '{' ? DE_JSON_OBJECT : DE_JSON_ARRAY;
        p->at++;
        return 0;
    case '"':
        p->at++;
        v->kind = DE_JSON_STRING;
        return read_string(p, &v->text, &v->n);
    case 't':
        return read_word(p, v, "true", DE_JSON_TRUE);
    case 'f':
        return read_word(p, v, "false", DE_JSON_FALSE);
    case 'n':
        return read_word(p, v, "null", DE_JSON_NULL);
    default:
        if (c == '-' || (c >= '0' && c <= '9'))
            return read_number(p, v);
        return fail_at(p, p->at, "expected a value");
    }
}

/* A member's name and colon. */
static int read_name(parser *p, de_json *v)
{
    skip_blanks(p);
    if (p->at >= p->len || p->text[p->at] != '"')
        return fail_at(p, p->at, "expected a name in quotes");
    p->at++;
    const size_t at = p->at;
    int r = read_string(p, &v->key, &v->key_len);
    if (r < 0)
        return r;
    if (memchr(v->key, 0, v->key_len))
        return fail_at(p, at, "\\u0000 in a name");
    skip_blanks(p);
    if (p->at >= p->len || p->text[p->at] != ':')
        return fail_at(p, p->at, "expected ':'");
    p->at++;
    return 0;
}

typedef struct open_container {
    de_json *v, *last; /* last: its newest child */
} open_container;

/* After a value or an opening bracket: closes containers that end here. Returns 1 if another
 * value follows in the innermost one (its comma was read), 0 if all are closed. */
static int close_containers(parser *p, open_container *stack, int *depth)
{
    while (*depth > 0) {
        de_json *v = stack[*depth - 1].v;
        const char closer = v->kind == DE_JSON_OBJECT ? '}' : ']';
        skip_blanks(p);
        if (p->at < p->len && p->text[p->at] == closer) {
            p->at++;
            v->end = p->at;
            if (v->kind == DE_JSON_OBJECT) {
                int r = check_names(p, v);
                if (r < 0)
                    return r;
            }
            (*depth)--;
            continue;
        }
        if (!stack[*depth - 1].last)
            return 1; /* the first child: no comma */
        if (p->at >= p->len || p->text[p->at] != ',')
            return fail_at(p, p->at, closer == '}' ? "expected ',' or '}'" : "expected ',' or ']'");
        p->at++;
        return 1;
    }
    return 0;
}

int de_json_parse(de_arena *a, const char *text, size_t len, de_json **ret_v, delta_error *err)
{
    parser p = { .arena = a, .text = text, .len = len, .err = err };
    open_container stack[DE_JSON_DEPTH];
    int depth = 0, r;
    de_json *root = NULL;
    do {
        de_json *v = de_arena_zalloc(a, sizeof *v);
        if (!v)
            return no_memory(&p);
        open_container *in = depth ? &stack[depth - 1] : NULL;
        if (in && in->v->kind == DE_JSON_OBJECT) {
            r = read_name(&p, v);
            if (r < 0)
                return r;
        }
        skip_blanks(&p);
        r = read_head(&p, v);
        if (r < 0)
            return r;
        v->end = p.at;
        if (!in) {
            root = v;
        } else {
            if (in->last)
                in->last->next = v;
            else
                in->v->child = v;
            in->last = v;
            if (++in->v->n == UINT32_MAX)
                return fail_at(&p, v->begin, "too many members");
        }
        if (v->kind == DE_JSON_OBJECT || v->kind == DE_JSON_ARRAY) {
            if (depth == DE_JSON_DEPTH)
                return fail_at(&p, v->begin, "nested too deeply");
            stack[depth++] = (open_container){ .v = v };
        }
        r = close_containers(&p, stack, &depth);
        if (r < 0)
            return r;
    } while (r > 0);
    skip_blanks(&p);
    if (p.at != len)
        return fail_at(&p, p.at, "text after the value");
    *ret_v = root;
    return 0;
}

/* ---- access */

const de_json *de_json_get(const de_json *v, const char *key)
{
    if (!v || v->kind != DE_JSON_OBJECT)
        return NULL;
    size_t n = strlen(key);
    for (const de_json *c = v->child; c; c = c->next)
        if (c->key_len == n && memcmp(c->key, key, n) == 0)
            return c;
    return NULL;
}

bool de_json_is_string(const de_json *v, const char *text)
{
    return v && v->kind == DE_JSON_STRING && v->n == strlen(text) &&
           memcmp(v->text, text, v->n) == 0;
}

static bool is_integer(const de_json *v)
{
    return v && v->kind == DE_JSON_NUMBER && !memchr(v->text, '.', v->n) &&
           !memchr(v->text, 'e', v->n) && !memchr(v->text, 'E', v->n);
}

static bool magnitude(const char *s, uint64_t *ret)
{
    uint64_t u = 0;
    for (; *s; s++)
        if (!de_mul_u64(u, 10, &u) || !de_add_u64(u, (uint64_t)(*s - '0'), &u))
            return false;
    *ret = u;
    return true;
}

bool de_json_u64(const de_json *v, uint64_t *ret)
{
    return is_integer(v) && v->text[0] != '-' && magnitude(v->text, ret);
}

bool de_json_double(const de_json *v, double *ret)
{
    if (!v || v->kind != DE_JSON_NUMBER)
        return false;
    double d = strtod(v->text, NULL);
    if (!isfinite(d))
        return false;
    *ret = d;
    return true;
}

bool de_json_bool(const de_json *v, bool *ret)
{
    if (!v || (v->kind != DE_JSON_TRUE && v->kind != DE_JSON_FALSE))
        return false;
    *ret = v->kind == DE_JSON_TRUE;
    return true;
}

/* ---- writing */

void de_text_add(de_text *t, const char *bytes, size_t len)
{
    if (t->failed)
        return;
    if (len >= SIZE_MAX / 2 || t->len > SIZE_MAX / 2 - len - 1) {
        t->failed = true;
        return;
    }
    if (t->len + len + 1 > t->cap) {
        size_t cap = t->cap ? t->cap : 64;
        while (cap < t->len + len + 1)
            cap *= 2;
        char *p = realloc(t->p, cap);
        if (!p) {
            t->failed = true;
            return;
        }
        t->p = p;
        t->cap = cap;
    }
    if (len)
        memcpy(t->p + t->len, bytes, len);
    t->len += len;
    t->p[t->len] = 0;
}

void de_text_puts(de_text *t, const char *s)
{
    de_text_add(t, s, strlen(s));
}

void de_text_done(de_text *t)
{
    free(t->p);
    *t = (de_text){ 0 };
}

void de_json_write_string_part(de_text *t, const char *s, size_t len)
{
    size_t from = 0;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\')
            continue;
        de_text_add(t, s + from, i - from);
        from = i + 1;
        static const char values[] = "\"\\\b\f\n\r\t", names[] = "\"\\bfnrt";
        const char *known = c ? strchr(values, c) : NULL;
        char escape[8];
        if (known)
            (void)snprintf(escape, sizeof escape, "\\%c", names[known - values]);
        else
            (void)snprintf(escape, sizeof escape, "\\u%04x", c);
        de_text_puts(t, escape);
    }
    de_text_add(t, s + from, len - from);
}

void de_json_write_string(de_text *t, const char *s, size_t len)
{
    de_text_add(t, "\"", 1);
    de_json_write_string_part(t, s, len);
    de_text_add(t, "\"", 1);
}

/* repr() of a Python float: the shortest digits that read back as d; fixed notation for
 * exponents -4 .. 15. */
static void write_python_float(de_text *t, double d)
{
    if (isinf(d)) { /* what json.loads makes of 1e999 */
        de_text_puts(t, d < 0 ? "-Infinity" : "Infinity");
        return;
    }
    char s[40];
    int precision = 0;
    do
        (void)snprintf(s, sizeof s, "%.*e", precision, d);
    while (strtod(s, NULL) != d && ++precision < 17);
    const int exponent = atoi(strchr(s, 'e') + 1);
    if (exponent >= -4 && exponent < 16) {
        int decimals = precision - exponent;
        (void)snprintf(s, sizeof s, "%.*f", decimals < 1 ? 1 : decimals, d);
    }
    de_text_puts(t, s);
}

void de_json_write(de_text *t, const de_json *v, bool compact)
{
    const bool object = v->kind == DE_JSON_OBJECT;
    switch (v->kind) {
    case DE_JSON_NULL:
        de_text_puts(t, "null");
        break;
    case DE_JSON_FALSE:
        de_text_puts(t, "false");
        break;
    case DE_JSON_TRUE:
        de_text_puts(t, "true");
        break;
    case DE_JSON_NUMBER:
        if (compact)
            de_text_add(t, v->text, v->n);
        else if (!is_integer(v))
            write_python_float(t, strtod(v->text, NULL));
        else /* int("-0") is 0 */
            de_text_puts(t, strcmp(v->text, "-0") == 0 ? "0" : v->text);
        break;
    case DE_JSON_STRING:
        de_json_write_string(t, v->text, v->n);
        break;
    case DE_JSON_ARRAY:
    case DE_JSON_OBJECT: /* recursion: at most DE_JSON_DEPTH deep, the parser saw to it */
        de_text_puts(t, object ? "{" : "[");
        for (const de_json *c = v->child; c; c = c->next) {
            if (c != v->child)
                de_text_puts(t, compact ? "," : ", ");
            if (object) {
                de_json_write_string(t, c->key, c->key_len);
                de_text_puts(t, compact ? ":" : ": ");
            }
            de_json_write(t, c, compact);
        }
        de_text_puts(t, object ? "}" : "]");
        break;
    }
}
