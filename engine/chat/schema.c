/* schema.c -- see schema.h. */
#include "chat/schema.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "chat/text.h"

/* ---- which types a schema allows */

static unsigned type_by_name(const de_json *v)
{
    static const struct {
        const char *name; /* a trailing '*' stands for anything */
        unsigned type;
    } known[] = { { "null", DE_TYPE_NULL },
                  { "none", DE_TYPE_NULL },
                  { "interface*", 0 },
                  { "int*", DE_TYPE_INTEGER },
                  { "uint*", DE_TYPE_INTEGER },
                  { "long*", DE_TYPE_INTEGER },
                  { "short*", DE_TYPE_INTEGER },
                  { "unsigned*", DE_TYPE_INTEGER },
                  { "bigint", DE_TYPE_INTEGER },
                  { "num*", DE_TYPE_NUMBER },
                  { "float*", DE_TYPE_NUMBER },
                  { "double*", DE_TYPE_NUMBER },
                  { "decimal*", DE_TYPE_NUMBER },
                  { "real", DE_TYPE_NUMBER },
                  { "bool*", DE_TYPE_BOOLEAN },
                  { "binary", DE_TYPE_BOOLEAN },
                  { "object*", DE_TYPE_NESTED },
                  { "dict*", DE_TYPE_NESTED },
                  { "map*", DE_TYPE_NESTED },
                  { "struct*", DE_TYPE_NESTED },
                  { "arr*", DE_TYPE_NESTED },
                  { "list*", DE_TYPE_NESTED },
                  { "tuple*", DE_TYPE_NESTED },
                  { "set*", DE_TYPE_NESTED },
                  { "sequence*", DE_TYPE_NESTED } };
    if (v->kind != DE_JSON_STRING)
        return 0;
    char name[16] = { 0 };
    for (uint32_t i = 0; i < v->n && i + 1 < sizeof name; i++) {
        char c = v->text[i];
        name[i] = (char)(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        size_t len = strlen(known[i].name);
        bool star = known[i].name[len - 1] == '*';
        if (star ? strncmp(name, known[i].name, len - 1) == 0 : strcmp(name, known[i].name) == 0)
            return known[i].type;
    }
    return DE_TYPE_STRING; /* string, str, text, varchar, enum, and what nobody knows */
}

static unsigned type_of_value(const de_json *v)
{
    switch (v->kind) {
    case DE_JSON_NULL:
        return DE_TYPE_NULL;
    case DE_JSON_FALSE:
    case DE_JSON_TRUE:
        return DE_TYPE_BOOLEAN;
    case DE_JSON_NUMBER:
        return strpbrk(v->text, ".eE") ? DE_TYPE_NUMBER : DE_TYPE_INTEGER;
    case DE_JSON_STRING:
        return DE_TYPE_STRING;
    case DE_JSON_ARRAY:
    case DE_JSON_OBJECT:
        return DE_TYPE_NESTED;
    }
    return 0;
}

/* "#/a/b": a path from the root of the tool's schema, with ~0 and ~1 for '~' and '/'. */
static const de_json *resolve(const de_json *root, const de_json *ref)
{
    if (!ref || ref->kind != DE_JSON_STRING || ref->n == 0 || ref->text[0] != '#')
        return NULL;
    const de_json *at = root;
    for (const char *s = ref->text + 1; at && *s == '/';) {
        char name[256];
        size_t len = 0;
        for (s++; *s && *s != '/' && len + 1 < sizeof name; s++) {
            char c = *s;
            if (c == '~' && (s[1] == '0' || s[1] == '1'))
                c = *++s == '0' ? '~' : '/';
            name[len++] = c;
        }
        name[len] = 0;
        at = de_json_get(at, name);
    }
    return at;
}

typedef struct walk {
    const de_json *root;
    unsigned steps; /* left: a schema that refers to itself many times ends here */
} walk;

static unsigned types_of(walk *w, const de_json *schema, int depth);

static unsigned types_of_all(walk *w, const de_json *list, int depth, bool every)
{
    unsigned types = 0;
    for (const de_json *s = list && list->kind == DE_JSON_ARRAY ? list->child : NULL; s;
         s = s->next) {
        unsigned t = types_of(w, s, depth);
        if (every && types && t)
            types = types & t ? types & t : types;
        else
            types |= t;
    }
    return types;
}

/* 0: says nothing. Recursion ends at DE_SCHEMA_DEPTH. */
static unsigned types_of(walk *w, const de_json *schema, int depth)
{
    if (depth >= DE_SCHEMA_DEPTH || w->steps == 0 || !schema || schema->kind != DE_JSON_OBJECT)
        return 0;
    w->steps--;
    unsigned types = 0;
    const de_json *type = de_json_get(schema, "type");
    if (type && type->kind == DE_JSON_ARRAY)
        for (const de_json *t = type->child; t; t = t->next)
            types |= type_by_name(t);
    else if (type)
        types = type_by_name(type);
    if (!types) {
        const de_json *values = de_json_get(schema, "enum"), *one = de_json_get(schema, "const");
        for (const de_json *v = values && values->kind == DE_JSON_ARRAY ? values->child : NULL; v;
             v = v->next)
            types |= type_of_value(v);
        if (one)
            types |= type_of_value(one);
    }
    if (!types)
        types = types_of(w, resolve(w->root, de_json_get(schema, "$ref")), depth + 1);
    if (!types)
        types = types_of_all(w, de_json_get(schema, "anyOf"), depth + 1, false) |
                types_of_all(w, de_json_get(schema, "oneOf"), depth + 1, false);
    if (!types)
        types = types_of_all(w, de_json_get(schema, "allOf"), depth + 1, true);
    if (!types && (de_json_get(schema, "properties") || de_json_get(schema, "items") ||
                   de_json_get(schema, "additionalProperties")))
        types = DE_TYPE_NESTED;
    bool nullable = false;
    if (de_json_bool(de_json_get(schema, "nullable"), &nullable) && nullable)
        types |= DE_TYPE_NULL | (types ? 0 : DE_TYPE_STRING);
    return types;
}

/* ---- tools */

static delta_str copy(de_arena *a, const char *s, size_t len)
{
    return (delta_str){ de_arena_strndup(a, s, len), len };
}

static size_t add_params(de_arena *a, de_tool *t, walk *w, const de_json *schema, int depth);

static size_t add_params_of_all(de_arena *a, de_tool *t, walk *w, const de_json *list, int depth)
{
    size_t n = 0;
    for (const de_json *s = list && list->kind == DE_JSON_ARRAY ? list->child : NULL; s;
         s = s->next)
        n += add_params(a, t, w, s, depth);
    return n;
}

/* The properties of a call's schema and of the schemas that it is made of. How many there are; they
 * are added to t unless it is NULL. Fewer: no memory. Recursion ends at DE_SCHEMA_DEPTH. */
static size_t add_params(de_arena *a, de_tool *t, walk *w, const de_json *schema, int depth)
{
    if (depth >= DE_SCHEMA_DEPTH || w->steps == 0 || !schema || schema->kind != DE_JSON_OBJECT)
        return 0;
    w->steps--;
    const de_json *properties = de_json_get(schema, "properties");
    const size_t before = t ? t->n_params : 0; /* names among these may come again */
    size_t n = 0;
    for (const de_json *p = properties && properties->kind == DE_JSON_OBJECT ? properties->child
                                                                             : NULL;
         p; p = p->next) {
        if (depth && w->steps == 0)
            break;
        w->steps -= depth > 0;
        n++;
        if (!t)
            continue;
        walk own = { .root = w->root, .steps = 4096 };
        const unsigned found = types_of(&own, p, 0), types = found ? found : DE_TYPE_STRING;
        size_t i = 0;
        while (i < before && !de_str_eq(t->params[i].name, (delta_str){ p->key, p->key_len }))
            i++;
        if (i < before) {
            t->params[i].types |= types;
            continue;
        }
        const delta_str name = copy(a, p->key, p->key_len);
        if (!name.p)
            return 0;
        t->params[t->n_params++] = (de_param){ name, types };
    }
    if (n > w->steps) /* comparing names takes its time; nobody is served by such a tool */
        return n;
    n += add_params(a, t, w, resolve(w->root, de_json_get(schema, "$ref")), depth + 1);
    n += add_params_of_all(a, t, w, de_json_get(schema, "allOf"), depth + 1);
    n += add_params_of_all(a, t, w, de_json_get(schema, "anyOf"), depth + 1);
    n += add_params_of_all(a, t, w, de_json_get(schema, "oneOf"), depth + 1);
    return n;
}

static int read_tool(de_arena *a, const de_json *v, de_tool *ret, delta_error *err)
{
    const de_json *function = de_json_get(v, "function");
    if (!function)
        function = v;
    const de_json *name = de_json_get(function, "name");
    if (!name || name->kind != DE_JSON_STRING || name->n == 0)
        return delta_fail(err, DELTA_EINVALID, "no name");
    *ret = (de_tool){ .name = copy(a, name->text, name->n) };
    const de_json *parameters = de_json_get(function, "parameters");
    enum { STEPS = 4096 }; /* schemas looked into, and names found in inner ones */
    walk w = { .root = parameters, .steps = STEPS };
    const size_t n = add_params(a, NULL, &w, parameters, 0);
    ret->params = de_arena_array(a, n, sizeof *ret->params);
    w.steps = STEPS;
    if (!ret->name.p || !ret->params || add_params(a, ret, &w, parameters, 0) != n)
        return delta_fail(err, DELTA_ENOMEM, "tool %s", name->text);
    return 0;
}

int de_tools_read(de_arena *a, const delta_str *json, size_t n, de_tools *ret_t, delta_error *err)
{
    de_tools t = { .tools = de_arena_array(a, n, sizeof *t.tools) };
    if (!t.tools)
        return delta_fail(err, DELTA_ENOMEM, "%zu tools", n);
    for (; t.n_tools < n; t.n_tools++) {
        const delta_str text = json[t.n_tools];
        if (text.len > SIZE_MAX / 512)
            return delta_fail(err, DELTA_ELIMIT, "tools[%zu]: %zu bytes", t.n_tools, text.len);
        de_arena scratch;
        de_arena_init(&scratch, 256 * text.len + 4096);
        de_json *v = NULL;
        int e = de_json_parse(&scratch, text.p, text.len, &v, err);
        if (e >= 0)
            e = read_tool(a, v, &t.tools[t.n_tools], err);
        de_arena_done(&scratch);
        if (e < 0) {
            delta_error_prefix(err, "tools[%zu]", t.n_tools);
            e = e == DELTA_EFORMAT ? DELTA_EINVALID : e;
            if (err)
                err->code = e;
            return e;
        }
    }
    *ret_t = t;
    return 0;
}

const de_tool *de_tools_find(const de_tools *t, delta_str name)
{
    for (size_t i = 0; i < t->n_tools; i++)
        if (de_str_eq(t->tools[i].name, name))
            return &t->tools[i];
    return NULL;
}

bool de_tools_has_prefix(const de_tools *t, delta_str name_start)
{
    for (size_t i = 0; i < t->n_tools; i++)
        if (de_starts_with(t->tools[i].name, name_start))
            return true;
    return false;
}

const de_param *de_tool_param(const de_tool *t, delta_str name)
{
    for (size_t i = 0; t && i < t->n_params; i++)
        if (de_str_eq(t->params[i].name, name))
            return &t->params[i];
    return NULL;
}

/* ---- Python literals, to JSON */

typedef struct literal {
    const char *s, *end;
    de_text *out;
} literal;

static void skip_blanks(literal *l)
{
    while (l->s < l->end && strchr(" \t\r\n", *l->s) && *l->s)
        l->s++;
}

static bool take(literal *l, char c)
{
    skip_blanks(l);
    if (l->s >= l->end || *l->s != c)
        return false;
    l->s++;
    return true;
}

static bool take_word(literal *l, const char *word, const char *json)
{
    size_t len = strlen(word);
    if ((size_t)(l->end - l->s) < len || memcmp(l->s, word, len) != 0)
        return false;
    l->s += len;
    de_text_puts(l->out, json);
    return true;
}

static void put_character(de_text *t, uint32_t c)
{
    char u[4];
    const size_t n = de_utf8_put(u, c);
    de_json_write_string_part(t, u, n);
}

static bool literal_escape(literal *l)
{
    static const char names[] = "\\'\"abfnrtv", values[] = "\\'\"\a\b\f\n\r\t\v";
    if (l->s >= l->end)
        return false;
    char c = *l->s++;
    if (c == '\n')
        return true;
    const char *known = c ? strchr(names, c) : NULL;
    if (known) {
        de_json_write_string_part(l->out, &values[known - names], 1);
        return true;
    }
    const int digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) { /* Python keeps the backslash of escapes it does not know */
        if (c >= '0' && c <= '7')
            return false;
        de_json_write_string_part(l->out, "\\", 1);
        l->s--;
        return true;
    }
    uint32_t v = 0;
    for (int i = 0; i < digits; i++, l->s++) {
        if (l->s >= l->end)
            return false;
        char h = *l->s;
        uint32_t d = h >= '0' && h <= '9'   ? (uint32_t)(h - '0')
                     : h >= 'a' && h <= 'f' ? (uint32_t)(h - 'a' + 10)
                     : h >= 'A' && h <= 'F' ? (uint32_t)(h - 'A' + 10)
                                            : 16;
        if (d > 15)
            return false;
        v = v << 4 | d;
    }
    if (v > 0x10FFFF || (v >= 0xD800 && v <= 0xDFFF))
        return false;
    put_character(l->out, v);
    return true;
}

static bool literal_string(literal *l)
{
    const char quote = *l->s++;
    de_text_puts(l->out, "\"");
    while (l->s < l->end && *l->s != quote) {
        if (*l->s == '\\') {
            l->s++;
            if (!literal_escape(l))
                return false;
            continue;
        }
        if (*l->s == '\n')
            return false;
        de_json_write_string_part(l->out, l->s++, 1);
    }
    if (l->s >= l->end)
        return false;
    l->s++;
    de_text_puts(l->out, "\"");
    return true;
}

static bool write_number(de_text *out, delta_str s);

/* Python has .5 and 5. and +5, but no 05. */
static bool literal_number(literal *l)
{
    const char *from = l->s;
    while (l->s < l->end && *l->s && strchr("+-.0123456789eE", *l->s))
        l->s++;
    const char *digits = from + (l->s > from && (*from == '-' || *from == '+'));
    if (l->s - digits > 1 && digits[0] == '0' && digits[1] >= '0' && digits[1] <= '9')
        return false;
    return write_number(l->out, (delta_str){ from, (size_t)(l->s - from) });
}

/* Recursion: at most as deep as JSON may be. */
static bool literal_value(literal *l, int depth)
{
    skip_blanks(l);
    if (l->s >= l->end || depth > DE_JSON_DEPTH)
        return false;
    const char c = *l->s;
    if (c == '\'' || c == '"')
        return literal_string(l);
    if (c != '[' && c != '(' && c != '{')
        return take_word(l, "True", "true") || take_word(l, "False", "false") ||
               take_word(l, "None", "null") || take_word(l, "true", "true") ||
               take_word(l, "false", "false") || take_word(l, "null", "null") || literal_number(l);

    const bool object = c == '{';
    const char close = object ? '}' : c == '[' ? ']' : ')';
    const size_t at = l->out->len;
    size_t n = 0;
    bool comma = false;
    l->s++;
    de_text_puts(l->out, object ? "{" : "[");
    for (; !take(l, close); n++) {
        if (n && !take(l, ','))
            return false;
        comma |= n > 0;
        if (n && take(l, close)) /* a comma may stand before the end */
            break;
        if (n)
            de_text_puts(l->out, ",");
        skip_blanks(l);
        if (object) {
            if (l->s >= l->end || (*l->s != '\'' && *l->s != '"') || !literal_string(l) ||
                !take(l, ':'))
                return false;
            de_text_puts(l->out, ":");
        }
        if (!literal_value(l, depth + 1))
            return false;
    }
    if (c == '(' && n == 1 && !comma && !l->out->failed) { /* no tuple, a value in parentheses */
        memmove(l->out->p + at, l->out->p + at + 1, l->out->len - at - 1);
        l->out->len--;
        return true;
    }
    de_text_puts(l->out, object ? "}" : "]");
    return true;
}

/* ---- text to values */

static bool write_integer(de_text *out, delta_str s)
{
    bool minus = s.len && s.p[0] == '-';
    if (s.len && (s.p[0] == '-' || s.p[0] == '+')) {
        s.p++;
        s.len--;
    }
    if (!s.len)
        return false;
    for (size_t i = 0; i < s.len; i++)
        if (s.p[i] < '0' || s.p[i] > '9')
            return false;
    while (s.len > 1 && s.p[0] == '0') { /* int("007") */
        s.p++;
        s.len--;
    }
    if (minus && !(s.len == 1 && s.p[0] == '0'))
        de_text_puts(out, "-");
    de_text_add(out, s.p, s.len);
    return true;
}

/* A finite decimal number. What JSON would refuse in its spelling (+1, .5, 5.) is mended. */
static bool write_number(de_text *out, delta_str s)
{
    if (write_integer(out, s))
        return true;
    size_t i = 0, whole = 0, fraction = 0;
    const bool minus = s.len && s.p[0] == '-';
    if (s.len && (s.p[0] == '-' || s.p[0] == '+'))
        i++;
    size_t from = i;
    for (; i < s.len && s.p[i] >= '0' && s.p[i] <= '9'; i++)
        whole++;
    size_t fraction_at = i + 1;
    if (i < s.len && s.p[i] == '.')
        for (i++; i < s.len && s.p[i] >= '0' && s.p[i] <= '9'; i++)
            fraction++;
    if (whole + fraction == 0)
        return false;
    const size_t exponent_at = i;
    if (i < s.len && (s.p[i] == 'e' || s.p[i] == 'E')) {
        i++;
        if (i < s.len && (s.p[i] == '-' || s.p[i] == '+'))
            i++;
        size_t digits = i;
        while (i < s.len && s.p[i] >= '0' && s.p[i] <= '9')
            i++;
        if (i == digits)
            return false;
    }
    if (i != s.len)
        return false;

    de_text t = { 0 };
    while (whole > 1 && s.p[from] == '0') {
        from++;
        whole--;
    }
    de_text_puts(&t, minus ? "-" : "");
    if (whole)
        de_text_add(&t, s.p + from, whole);
    else
        de_text_puts(&t, "0");
    if (fraction) {
        de_text_puts(&t, ".");
        de_text_add(&t, s.p + fraction_at, fraction);
    }
    de_text_add(&t, s.p + exponent_at, s.len - exponent_at);
    if (t.failed) {
        out->failed = true;
        de_text_done(&t);
        return true;
    }
    const bool finite = isfinite(strtod(t.p, NULL));
    if (finite)
        de_text_add(out, t.p, t.len);
    de_text_done(&t);
    return finite;
}

static bool equals_any_case(delta_str s, const char *word)
{
    for (size_t i = 0; i < s.len; i++) {
        char c = s.p[i];
        if (c >= 'A' && c <= 'Z')
            c = (char)(c - 'A' + 'a');
        if (c != word[i]) /* the NUL at the end differs too */
            return false;
    }
    return word[s.len] == 0;
}

enum nested { NESTED_NO, NESTED_STRING, NESTED_YES };

/* DE_JSON_DEPTH if a number in it is not finite: such a value is not passed on. Integers always are
 * finite: they keep their digits, however many. */
static int depth_of(const de_json *v)
{
    int most = 0;
    if (v->kind == DE_JSON_NUMBER && strpbrk(v->text, ".eE") && !isfinite(strtod(v->text, NULL)))
        return DE_JSON_DEPTH;
    for (const de_json *c = v->child; c; c = c->next) {
        const int depth = depth_of(c);
        most = depth > most ? depth : most;
    }
    return most + (v->kind == DE_JSON_ARRAY || v->kind == DE_JSON_OBJECT);
}

/* Writes an object or array that is JSON; of a JSON string it gives what the string holds. */
static enum nested write_json(de_text *out, delta_str s, de_text *ret_string)
{
    if (s.len == 0 || s.len > SIZE_MAX / 512)
        return NESTED_NO;
    de_arena a;
    de_arena_init(&a, 256 * s.len + 4096);
    de_json *v = NULL;
    enum nested is = NESTED_NO;
    const int e = de_json_parse(&a, s.p, s.len, &v, NULL);
    out->failed |= e == DELTA_ENOMEM; /* not the same as being no JSON */
    if (e >= 0) {
        if (v->kind == DE_JSON_OBJECT || v->kind == DE_JSON_ARRAY) {
            is = depth_of(v) < DE_JSON_DEPTH ? NESTED_YES : NESTED_NO; /* a level comes around */
            if (is == NESTED_YES)
                de_json_write(out, v, true);
        } else if (v->kind == DE_JSON_STRING && ret_string) {
            de_text_add(ret_string, v->text, v->n);
            is = NESTED_STRING;
        }
    }
    de_arena_done(&a);
    return is;
}

static bool write_literal(de_text *out, delta_str s)
{
    de_text t = { 0 };
    literal l = { .s = s.p, .end = s.p + s.len, .out = &t };
    bool ok = s.len && literal_value(&l, 0);
    skip_blanks(&l);
    out->failed |= t.failed;
    ok = ok && l.s == l.end && !t.failed && t.p &&
         write_json(out, (delta_str){ t.p, t.len }, NULL) == NESTED_YES;
    de_text_done(&t);
    return ok;
}

static bool write_nested(de_text *out, delta_str s)
{
    de_text inner = { 0 };
    enum nested is = write_json(out, s, &inner);
    bool ok = is == NESTED_YES;
    if (is == NESTED_NO)
        ok = write_literal(out, s);
    else if (is == NESTED_STRING && inner.p)
        ok = write_json(out, (delta_str){ inner.p, inner.len }, NULL) == NESTED_YES;
    out->failed |= inner.failed;
    de_text_done(&inner);
    return ok;
}

bool de_value_write(de_text *out, delta_str text, unsigned types)
{
    /* White space around a value is part of a string, where only strings are to be told from null. */
    const bool text_or_null = (types & ~(unsigned)DE_TYPE_NULL) == DE_TYPE_STRING;
    const delta_str s = text_or_null ? text : de_strip(text);
    if (types & DE_TYPE_NULL && (de_str_eq(s, DE_STR("null")) || de_str_eq(s, DE_STR("None")))) {
        de_text_puts(out, "null");
        return true;
    }
    if (types & DE_TYPE_INTEGER && write_integer(out, s))
        return true;
    if (types & DE_TYPE_NUMBER && write_number(out, s))
        return true;
    if (types & DE_TYPE_BOOLEAN && equals_any_case(s, "true")) {
        de_text_puts(out, "true");
        return true;
    }
    if (types & DE_TYPE_BOOLEAN && equals_any_case(s, "false")) {
        de_text_puts(out, "false");
        return true;
    }
    if (types & DE_TYPE_NESTED && write_nested(out, s))
        return true;
    de_json_write_string(out, text.p, text.len);
    return (types & DE_TYPE_STRING) != 0;
}
