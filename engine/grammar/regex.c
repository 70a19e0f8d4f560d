/* regex.c -- see regex.h. */
#include "grammar/regex.h"

#include <string.h>

#include "base/utf8.h"

enum { TOP = 0x10FFFF };

static de_expr *fail(de_reader *r, int code, const char *what)
{
    if (!r->a->code && (!r->err || !r->err->code))
        (void)delta_fail(r->err, code, "%s at offset %zu", what, r->at);
    if (!r->a->code)
        r->a->code = code;
    return NULL;
}

static bool has(const de_reader *r, char c)
{
    return r->at < r->len && r->s[r->at] == c;
}

static bool accept(de_reader *r, char c)
{
    if (!has(r, c))
        return false;
    r->at++;
    return true;
}

bool de_char_read(de_reader *r, uint32_t *ret_c)
{
    const size_t n = r->at < r->len ? de_utf8_len(r->s + r->at, r->len - r->at) : 0;
    if (n == 0) {
        (void)fail(r, DELTA_EINVALID, r->at < r->len ? "no UTF-8" : "the end is too early");
        return false;
    }
    const uint8_t *s = (const uint8_t *)r->s + r->at;
    static const uint8_t first[] = { 0, 0x7F, 0x1F, 0x0F, 0x07 };
    uint32_t c = s[0] & first[n];
    for (size_t i = 1; i < n; i++)
        c = c << 6 | (s[i] & 0x3F);
    r->at += n;
    *ret_c = c;
    return true;
}

/* ---- escapes and classes */

static bool hex_read(de_reader *r, unsigned min, unsigned max, uint32_t *ret)
{
    uint32_t v = 0;
    unsigned n = 0;
    for (; n < max && r->at < r->len; n++, r->at++) {
        const char c = r->s[r->at];
        const int d = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
        if (d < 0)
            break;
        v = v << 4 | (uint32_t)d;
    }
    if (n < min || v > TOP || (v >= 0xD800 && v <= 0xDFFF)) {
        (void)fail(r, DELTA_EINVALID, "not the number of a character");
        return false;
    }
    *ret = v;
    return true;
}

bool de_escape_read(de_reader *r, uint32_t *ret_c)
{
    static const char names[] = "nrtfv0", values[] = "\n\r\t\f\v";
    if (r->at >= r->len)
        return fail(r, DELTA_EINVALID, "a backslash at the end") != NULL;
    const char c = r->s[r->at];
    const char *known = c ? strchr(names, c) : NULL;
    if (known) {
        r->at++;
        *ret_c = c == '0' ? 0 : (uint32_t)values[known - names];
        return true;
    }
    if (c == 'x') {
        r->at++;
        return hex_read(r, 2, 2, ret_c);
    }
    if (c == 'u') {
        r->at++;
        if (!accept(r, '{'))
            return hex_read(r, 4, 4, ret_c);
        if (!hex_read(r, 1, 6, ret_c))
            return false;
        if (!accept(r, '}'))
            return fail(r, DELTA_EINVALID, "no } behind \\u{") != NULL;
        return true;
    }
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '1' && c <= '9'))
        return fail(r, DELTA_EUNSUPPORTED, "this escape is not supported") != NULL;
    return de_char_read(r, ret_c);
}

/* A set of characters: what is surely in it, and what may be. */
typedef struct charset {
    de_range in[DE_CLASS_RANGES], may[DE_CLASS_RANGES];
    uint32_t n_in, n_may;
} charset;

static bool set_add(de_reader *r, de_range *ranges, uint32_t *n, uint32_t lo, uint32_t hi)
{
    if (*n == DE_CLASS_RANGES)
        return fail(r, DELTA_ELIMIT, "a class of too many ranges") != NULL;
    ranges[(*n)++] = (de_range){ lo, hi };
    return true;
}

static bool set_both(de_reader *r, charset *s, uint32_t lo, uint32_t hi)
{
    return set_add(r, s->in, &s->n_in, lo, hi) && set_add(r, s->may, &s->n_may, lo, hi);
}

/* \d \w \s and their opposites. ASCII is certain; what is beyond it is in one of d and D, and the
 * two languages do not agree in which. Of white space they nearly do. */
static const de_range digit[] = { { '0', '9' } };
static const de_range word[] = { { '0', '9' }, { 'A', 'Z' }, { '_', '_' }, { 'a', 'z' } };
static const de_range space[] = { { 0x09, 0x0D }, { ' ', ' ' } };
static const de_range wide_space[] = { { 0x09, 0x0D },     { 0x1C, 0x20 },     { 0x85, 0x85 },
                                       { 0xA0, 0xA0 },     { 0x1680, 0x1680 }, { 0x2000, 0x200A },
                                       { 0x2028, 0x2029 }, { 0x202F, 0x202F }, { 0x205F, 0x205F },
                                       { 0x3000, 0x3000 }, { 0xFEFF, 0xFEFF } };

/* Adds what is not in the sorted ranges, up to `top`. */
static bool add_others(de_reader *r, de_range *out, uint32_t *n_out, const de_range *of, size_t n,
                       uint32_t top)
{
    uint32_t lo = 0;
    for (size_t i = 0; i < n; i++) {
        if (of[i].lo > lo && !set_add(r, out, n_out, lo, of[i].lo - 1))
            return false;
        lo = of[i].hi + 1;
    }
    return lo > top || set_add(r, out, n_out, lo, top);
}

static bool set_named(de_reader *r, charset *s, char c)
{
    const de_range *of = c == 'd' || c == 'D' ? digit : c == 'w' || c == 'W' ? word : space;
    const size_t n = of == digit ? 1 : of == word ? 4 : 2;
    if (c >= 'a') {
        for (size_t i = 0; i < n; i++)
            if (!set_both(r, s, of[i].lo, of[i].hi))
                return false;
        if (c != 's')
            return set_add(r, s->may, &s->n_may, 0x80, TOP);
        for (size_t i = 0; i < sizeof wide_space / sizeof *wide_space; i++)
            if (!set_add(r, s->may, &s->n_may, wide_space[i].lo, wide_space[i].hi))
                return false;
        return true;
    }
    if (c == 'S')
        return add_others(r, s->in, &s->n_in, wide_space, sizeof wide_space / sizeof *wide_space,
                          TOP) &&
               add_others(r, s->may, &s->n_may, space, n, TOP);
    return add_others(r, s->in, &s->n_in, of, n, 0x7F) &&
           add_others(r, s->may, &s->n_may, of, n, TOP);
}

static bool is_named(char c)
{
    return c && strchr("dDwWsS", c) != NULL;
}

/* One end of a range, or a class of its own (*ret_c is then UINT32_MAX). */
static bool class_item(de_reader *r, charset *s, uint32_t *ret_c)
{
    if (!accept(r, '\\'))
        return de_char_read(r, ret_c);
    if (r->at < r->len && is_named(r->s[r->at])) {
        *ret_c = UINT32_MAX;
        return set_named(r, s, r->s[r->at++]);
    }
    if (accept(r, 'b')) {
        *ret_c = '\b';
        return true;
    }
    return de_escape_read(r, ret_c);
}

static de_expr *others(de_reader *r, const de_expr *e)
{
    de_range out[DE_CLASS_RANGES + 1];
    uint32_t n = 0;
    if (!e || !add_others(r, out, &n, e->ranges, e->n_ranges, TOP))
        return NULL;
    return de_expr_chars(r->a, out, n);
}

de_expr *de_class_read(de_reader *r)
{
    charset s = { .n_in = 0 };
    const bool not = accept(r, '^');
    for (bool first = true; first || !has(r, ']'); first = false) {
        uint32_t lo, hi;
        if (has(r, ']')) /* [] is not the same everywhere */
            return fail(r, DELTA_EUNSUPPORTED, "an empty class");
        if (has(r, '[') && r->at + 1 < r->len && strchr(":.=", r->s[r->at + 1]))
            return fail(r, DELTA_EUNSUPPORTED, "a class by name");
        if (!class_item(r, &s, &lo))
            return NULL;
        hi = lo;
        if (lo != UINT32_MAX && has(r, '-') && r->at + 1 < r->len && r->s[r->at + 1] != ']') {
            r->at++;
            if (!class_item(r, &s, &hi))
                return NULL;
            if (hi == UINT32_MAX || hi < lo)
                return fail(r, DELTA_EINVALID, "a range that ends before it begins");
        }
        if (lo != UINT32_MAX && !set_both(r, &s, lo, hi))
            return NULL;
    }
    r->at++;
    return not ? others(r, de_expr_chars(r->a, s.may, s.n_may)) : de_expr_chars(r->a, s.in, s.n_in);
}

de_expr *de_any_char(de_auto *a)
{
    const de_range all[] = {
        { 0, 9 }, { 11, 12 }, { 14, 0x84 }, { 0x86, 0x2027 }, { 0x202A, TOP }
    };
    return de_expr_chars(a, all, 5);
}

/* ---- repetition */

static bool number_read(de_reader *r, uint32_t *ret)
{
    uint32_t v = 0;
    const size_t from = r->at;
    for (; r->at < r->len && r->s[r->at] >= '0' && r->s[r->at] <= '9'; r->at++) {
        v = 10 * v + (uint32_t)(r->s[r->at] - '0');
        if (v > DE_REPEAT_MAX)
            return fail(r, DELTA_ELIMIT, "more than 65535 times") != NULL;
    }
    *ret = v;
    return r->at > from;
}

de_expr *de_repeat_read(de_reader *r, de_expr *e)
{
    for (bool any = false; e; any = true) {
        uint32_t min = 0, max = DE_MANY;
        if (accept(r, '*')) {
        } else if (accept(r, '+')) {
            min = 1;
        } else if (accept(r, '?')) {
            max = 1;
        } else if (has(r, '{')) {
            r->at++;
            if (!number_read(r, &min))
                return fail(r, DELTA_EINVALID, "no number behind {");
            max = min;
            if (accept(r, ',') && !number_read(r, &max))
                max = DE_MANY;
            if (!accept(r, '}') || max < min)
                return fail(r, DELTA_EINVALID, "a malformed {m,n}");
        } else {
            return e;
        }
        if (any)
            return fail(r, DELTA_EINVALID, "two repetitions on end");
        e = de_expr_repeat(r->a, e, min, max);
        (void)accept(r, '?'); /* reluctant: the same texts match */
    }
    return e;
}

/* ---- regular expressions */

static de_expr *alternatives(de_reader *r, bool top, bool search);

static de_expr *group(de_reader *r)
{
    if (accept(r, '?')) {
        const size_t at = r->at;
        if (!accept(r, ':')) { /* a name does not matter */
            if ((accept(r, 'P'), accept(r, '<')) && r->at < r->len && r->s[r->at] != '=' &&
                r->s[r->at] != '!') {
                while (r->at < r->len && !accept(r, '>'))
                    r->at++;
            } else {
                r->at = at;
                return fail(r, DELTA_EUNSUPPORTED, "lookaround, flags and the like");
            }
        }
    }
    if (++r->depth > DELTA_GRAMMAR_DEPTH)
        return fail(r, DELTA_ELIMIT, "groups too deep");
    de_expr *e = alternatives(r, false, false);
    r->depth--;
    if (e && !accept(r, ')'))
        return fail(r, DELTA_EINVALID, "no )");
    return e;
}

static de_expr *one_char(de_reader *r, uint32_t c)
{
    return de_expr_chars(r->a, &(de_range){ c, c }, 1);
}

static de_expr *atom(de_reader *r)
{
    uint32_t c;
    if (accept(r, '('))
        return group(r);
    if (accept(r, '['))
        return de_class_read(r);
    if (accept(r, '.'))
        return de_any_char(r->a);
    if (has(r, '^') || has(r, '$'))
        return fail(r, DELTA_EUNSUPPORTED, "an anchor that is not at the very start or end");
    if (r->at < r->len && strchr("*+?{)", r->s[r->at]) && r->s[r->at])
        return fail(r, DELTA_EINVALID, "nothing to repeat");
    if (accept(r, '\\')) {
        if (r->at < r->len && is_named(r->s[r->at])) {
            charset s = { .n_in = 0 };
            return set_named(r, &s, r->s[r->at++]) ? de_expr_chars(r->a, s.in, s.n_in) : NULL;
        }
        return de_escape_read(r, &c) ? one_char(r, c) : NULL;
    }
    return de_char_read(r, &c) ? one_char(r, c) : NULL;
}

static de_expr *anything(de_reader *r)
{
    return de_expr_repeat(r->a, de_expr_chars(r->a, &(de_range){ 0, TOP }, 1), 0, DE_MANY);
}

/* top: not in a group, so that ^ and $ may stand at the ends. */
static de_expr *sequence(de_reader *r, bool top, bool search)
{
    de_expr *e = de_expr_list(r->a, DE_EXPR_SEQ);
    if (!(top && accept(r, '^')) && search)
        e = de_expr_add(e, anything(r));
    bool end = false;
    while (e && !end && r->at < r->len && !has(r, '|') && !has(r, ')')) {
        if (top && has(r, '$') && (r->at + 1 == r->len || r->s[r->at + 1] == '|')) {
            r->at++;
            end = true;
            break;
        }
        e = de_expr_add(e, de_repeat_read(r, atom(r)));
    }
    if (!end && search)
        e = de_expr_add(e, anything(r));
    return e;
}

static de_expr *alternatives(de_reader *r, bool top, bool search)
{
    de_expr *alt = de_expr_list(r->a, DE_EXPR_ALT);
    do
        alt = de_expr_add(alt, sequence(r, top, search));
    while (alt && accept(r, '|'));
    return alt;
}

int de_regex_read(de_auto *a, const char *s, size_t len, bool search, de_expr **ret_e,
                  delta_error *err)
{
    if (err)
        err->code = 0;
    de_reader r = { .a = a, .s = s, .len = len, .err = err };
    de_expr *e = alternatives(&r, true, search);
    if (e && r.at < len)
        e = fail(&r, DELTA_EINVALID, "a ) too many");
    if (!e && a->code == 0)
        a->code = DELTA_ENOMEM;
    if (!e && err && !err->code)
        return delta_fail(err, a->code, "regular expression of %zu bytes", len);
    if (!e)
        return a->code;
    *ret_e = e;
    return 0;
}

/* ---- lengths */

static uint32_t sum(uint32_t x, uint32_t y)
{
    return x == DE_MANY || y == DE_MANY || x + y < x ? DE_MANY : x + y;
}

static uint32_t times(uint32_t x, uint32_t n)
{
    if (x == 0 || n == 0)
        return 0;
    return x == DE_MANY || n == DE_MANY || (uint64_t)x * n >= DE_MANY ? DE_MANY : x * n;
}

void de_expr_lengths(const de_expr *e, uint32_t *ret_min, uint32_t *ret_max)
{
    uint32_t min = 0, max = 0;
    switch (e->kind) {
    case DE_EXPR_NEVER:
        break;
    case DE_EXPR_BYTES:
        min = max = (uint32_t)e->bytes.len;
        break;
    case DE_EXPR_CHARS:
        min = max = 1;
        break;
    case DE_EXPR_CALL:
        max = DE_MANY;
        break;
    case DE_EXPR_SEQ:
    case DE_EXPR_ALT:
        for (const de_expr *c = e->child; c; c = c->next) {
            uint32_t a, b;
            de_expr_lengths(c, &a, &b);
            if (e->kind == DE_EXPR_SEQ) {
                min = sum(min, a);
                max = sum(max, b);
            } else {
                min = c == e->child || a < min ? a : min;
                max = b > max ? b : max;
            }
        }
        break;
    case DE_EXPR_REPEAT:
        de_expr_lengths(e->child, &min, &max);
        min = times(min, e->min);
        max = times(max, e->max);
        break;
    }
    *ret_min = min;
    *ret_max = max;
}
