/* json.c -- see json.h. */
#include "grammar/json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void de_json_rules_init(de_json_rules *j, de_auto *a, bool in_call)
{
    *j = (de_json_rules){ .a = a,
                          .in_call = in_call,
                          .space = UINT32_MAX,
                          .string = UINT32_MAX,
                          .number = UINT32_MAX,
                          .integer = UINT32_MAX };
    for (int i = 0; i <= DE_ANY_DEPTH; i++)
        j->any[i] = UINT32_MAX;
}

static de_expr *bytes_between(de_auto *a, uint32_t lo, uint32_t hi)
{
    return de_expr_chars(a, &(de_range){ lo, hi }, 1);
}

static de_expr *digits(de_auto *a, uint32_t min, uint32_t max)
{
    return de_expr_repeat(a, bytes_between(a, '0', '9'), min, max);
}

static uint32_t make(de_auto *a, const de_expr *e)
{
    const uint32_t rule = de_rule_new(a);
    if (!a->code)
        de_rule_make(a, rule, e, DE_SPELL_PLAIN);
    return rule;
}

/* Nothing, a blank, or one or two newlines and what the next line is indented by. */
uint32_t de_json_space(de_json_rules *j)
{
    de_auto *a = j->a;
    if (j->space == UINT32_MAX) {
        const de_range blank[] = { { '\t', '\t' }, { ' ', ' ' } };
        de_expr *lines =
            de_expr_seq2(a, de_expr_repeat(a, bytes_between(a, '\n', '\n'), 1, 2),
                         de_expr_repeat(a, de_expr_chars(a, blank, 2), 0, DELTA_GRAMMAR_SPACE - 2));
        de_expr *alt = de_expr_list(a, DE_EXPR_ALT);
        alt = de_expr_add(de_expr_add(alt, lines), de_expr_literal(a, " "));
        j->space = make(a, de_expr_repeat(a, alt, 0, 1));
    }
    return j->space;
}

/* ---- strings */

static const de_range string_chars[] = { { 0x20, 0x21 }, { 0x23, 0x5B }, { 0x5D, 0x10FFFF } };

static void escapes(de_nfa *f, uint32_t from, uint32_t to)
{
    const uint32_t back = de_nfa_state(f, 0), u = de_nfa_state(f, 0);
    de_nfa_byte(f, from, '\\', '\\', back);
    for (const char *c = "\"\\/bfnrt"; *c; c++)
        de_nfa_byte(f, back, (uint8_t)*c, (uint8_t)*c, to);
    de_nfa_byte(f, back, 'u', 'u', u);
    /* four digits, not D800 .. DFFF, nor 0000, which the reader of arguments does not take */
    static const char *const hex[] = { "09", "AF", "af" };
    uint32_t any[5];
    for (int i = 0; i < 4; i++)
        any[i] = de_nfa_state(f, 0);
    any[4] = to;
    for (int i = 1; i < 4; i++)
        for (int k = 0; k < 3; k++)
            de_nfa_byte(f, any[i], (uint8_t)hex[k][0], (uint8_t)hex[k][1], any[i + 1]);
    const uint32_t d = de_nfa_state(f, 0), zero = de_nfa_state(f, 0), zero2 = de_nfa_state(f, 0),
                   zero3 = de_nfa_state(f, 0);
    de_nfa_byte(f, u, '1', '9', any[1]);
    for (int upper = 0; upper < 2; upper++) {
        const uint8_t c = upper ? 'A' : 'a';
        de_nfa_byte(f, u, c, (uint8_t)(c + 2), any[1]);
        de_nfa_byte(f, u, (uint8_t)(c + 3), (uint8_t)(c + 3), d);
        de_nfa_byte(f, u, (uint8_t)(c + 4), (uint8_t)(c + 5), any[1]);
        de_nfa_byte(f, zero, c, (uint8_t)(c + 5), any[2]);
        de_nfa_byte(f, zero2, c, (uint8_t)(c + 5), any[3]);
        de_nfa_byte(f, zero3, c, (uint8_t)(c + 5), to);
    }
    de_nfa_byte(f, d, '0', '7', any[2]);
    de_nfa_byte(f, u, '0', '0', zero);
    de_nfa_byte(f, zero, '1', '9', any[2]);
    de_nfa_byte(f, zero, '0', '0', zero2);
    de_nfa_byte(f, zero2, '1', '9', any[3]);
    de_nfa_byte(f, zero2, '0', '0', zero3);
    de_nfa_byte(f, zero3, '1', '9', to);
}

enum { MARK_BETWEEN = 1 };

/* Nodes of the inside of a string become nodes of that kind. first: the one where it begins. */
static void mark_nodes(de_auto *a, uint32_t base, uint32_t first, const uint16_t *marks,
                       enum de_node_kind kind, uint32_t arg)
{
    for (uint32_t i = base; i < a->n_nodes; i++) {
        de_node *n = &a->nodes[i];
        n->kind = (uint8_t)kind;
        n->arg = arg;
        if (marks[i - base] & MARK_BETWEEN)
            n->flags |= DE_NODE_BETWEEN;
        if (i == first)
            n->flags |= DE_NODE_NEUTRAL;
    }
    for (int bytes = 1; bytes < 4 && first != UINT32_MAX; bytes++) /* inside a character */
        for (uint32_t i = base; i < a->n_nodes; i++)
            for (uint32_t k = 0; a->nodes[i].flags & DE_NODE_NEUTRAL && k < a->nodes[i].n_edges;
                 k++) {
                const de_edge *e = &a->edges[a->nodes[i].edges + k];
                if (e->lo >= 0x80)
                    a->nodes[e->to].flags |= DE_NODE_NEUTRAL;
            }
}

static void no_tags(de_nfa *f, uint32_t in)
{
    const uint32_t die = de_nfa_state(f, DE_NFA_DIE);
    de_nfa_text(f, in, "</parameter>", die);
    de_nfa_text(f, in, "</function>", die);
    de_nfa_text(f, in, "</tool_call>", die);
}

uint32_t de_json_string(de_json_rules *j, uint32_t min, uint32_t max)
{
    de_auto *a = j->a;
    const bool plain = min == 0 && max == DE_MANY;
    if (plain && j->string != UINT32_MAX)
        return j->string;
    de_nfa f = { .a = a };
    const uint32_t in = de_nfa_state(&f, MARK_BETWEEN), end = de_nfa_state(&f, 0);
    de_nfa_chars(&f, in, string_chars, 3, in);
    escapes(&f, in, in);
    de_nfa_byte(&f, in, '"', '"', end);
    if (j->in_call)
        no_tags(&f, in);
    uint16_t *marks = NULL;
    const uint32_t arg = DE_APPEND(a, strings, (de_string){ min, max });
    const uint32_t base = de_nfa_subsets(&f, in, end, &marks);
    de_nfa_done(&f);
    if (a->code) {
        free(marks);
        return 0;
    }
    mark_nodes(a, base, base, marks, DE_NODE_STRING, arg);
    free(marks);
    /* the end of the string is a plain node */
    for (uint32_t i = base; i < a->n_nodes; i++)
        if (a->nodes[i].flags & DE_NODE_ACCEPT)
            a->nodes[i].kind = DE_NODE_PLAIN;
    const uint32_t inside = DE_APPEND(a, rules, base);
    const uint32_t rule =
        make(a, de_expr_seq2(a, de_expr_literal(a, "\""), de_expr_call(a, inside)));
    if (plain)
        j->string = rule;
    return rule;
}

static bool has_tag(const char *p, size_t len)
{
    return memmem(p, len, "</parameter>", 12) || memmem(p, len, "</function>", 11) ||
           memmem(p, len, "</tool_call>", 12);
}

/* The text, every '<' as an escape if tags are in it. Into the arena. */
static de_expr *spelled(de_json_rules *j, const char *p, size_t len)
{
    de_auto *a = j->a;
    size_t angles = 0;
    if (j->in_call && has_tag(p, len))
        for (size_t i = 0; i < len; i++)
            angles += p[i] == '<';
    char *out = de_arena_alloc(a->arena, len + 5 * angles + 1);
    if (!out) {
        a->code = a->code ? a->code : DELTA_ELIMIT;
        return NULL;
    }
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (angles && p[i] == '<') {
            memcpy(out + n, "\\u003c", 6);
            n += 6;
        } else {
            out[n++] = p[i];
        }
    }
    return de_expr_bytes(a, out, n);
}

/* JSON text, which goes. */
static de_expr *written(de_json_rules *j, de_text *t)
{
    de_expr *e = NULL;
    if (t->failed || !t->p)
        j->a->code = DELTA_ENOMEM;
    else
        e = spelled(j, t->p, t->len);
    de_text_done(t);
    return e;
}

static de_expr *scalar(de_json_rules *j, const de_json *v)
{
    de_text t = { 0 };
    de_json_write(&t, v, true);
    return written(j, &t);
}

/* Recursion: as deep as JSON may be. */
de_expr *de_json_literal(de_json_rules *j, const de_json *v)
{
    de_auto *a = j->a;
    if (v->kind != DE_JSON_ARRAY && v->kind != DE_JSON_OBJECT)
        return scalar(j, v);
    const bool object = v->kind == DE_JSON_OBJECT;
    const uint32_t space = de_json_space(j);
    de_expr *e = de_expr_list(a, DE_EXPR_SEQ);
    e = de_expr_add(e, de_expr_literal(a, object ? "{" : "["));
    e = de_expr_add(e, de_expr_call(a, space));
    for (const de_json *c = v->child; c && e; c = c->next) {
        if (object) {
            e = de_expr_add(e, de_json_key(j, (delta_str){ c->key, c->key_len }));
            e = de_expr_add(e, de_expr_call(a, space));
            e = de_expr_add(e, de_expr_literal(a, ":"));
            e = de_expr_add(e, de_expr_call(a, space));
        }
        e = de_expr_add(e, de_json_literal(j, c));
        e = de_expr_add(e, de_expr_call(a, space));
        if (c->next) {
            e = de_expr_add(e, de_expr_literal(a, ","));
            e = de_expr_add(e, de_expr_call(a, space));
        }
    }
    return de_expr_add(e, de_expr_literal(a, object ? "}" : "]"));
}

de_expr *de_json_key(de_json_rules *j, delta_str name)
{
    de_text t = { 0 };
    de_json_write_string(&t, name.p, name.len);
    return written(j, &t);
}

/* ---- numbers without bounds */

enum { DIGITS_MAX = 20 };

static de_expr *integer(de_auto *a)
{
    de_expr *alt = de_expr_list(a, DE_EXPR_ALT);
    alt = de_expr_add(alt, de_expr_literal(a, "0"));
    alt =
        de_expr_add(alt, de_expr_seq2(a, bytes_between(a, '1', '9'), digits(a, 0, DIGITS_MAX - 1)));
    return de_expr_seq2(a, de_expr_repeat(a, de_expr_literal(a, "-"), 0, 1), alt);
}

uint32_t de_json_integer(de_json_rules *j)
{
    if (j->integer == UINT32_MAX)
        j->integer = make(j->a, integer(j->a));
    return j->integer;
}

uint32_t de_json_number(de_json_rules *j)
{
    de_auto *a = j->a;
    if (j->number == UINT32_MAX) {
        de_expr *fraction = de_expr_seq2(a, de_expr_literal(a, "."), digits(a, 1, DIGITS_MAX));
        const de_range e[] = { { 'E', 'E' }, { 'e', 'e' } },
                       sign[] = { { '+', '+' }, { '-', '-' } };
        de_expr *exponent = de_expr_list(a, DE_EXPR_SEQ);
        exponent = de_expr_add(exponent, de_expr_chars(a, e, 2));
        exponent = de_expr_add(exponent, de_expr_repeat(a, de_expr_chars(a, sign, 2), 0, 1));
        exponent = de_expr_add(exponent, digits(a, 1, 2));
        de_expr *seq = de_expr_list(a, DE_EXPR_SEQ);
        seq = de_expr_add(seq, integer(a));
        seq = de_expr_add(seq, de_expr_repeat(a, fraction, 0, 1));
        seq = de_expr_add(seq, de_expr_repeat(a, exponent, 0, 1));
        j->number = make(a, seq);
    }
    return j->number;
}

/* ---- members with free keys */

/* The nodes of the inside of a key, up to its closing quote; returns the first. */
static uint32_t key_nodes(de_auto *a, bool in_call, const de_expr *pattern, uint32_t arg)
{
    de_nfa f = { .a = a };
    const uint32_t in = de_nfa_state(&f, pattern ? 0 : MARK_BETWEEN);
    uint32_t end = in;
    if (pattern) {
        end = de_nfa_state(&f, 0);
        de_nfa_expr(&f, in, pattern, DE_SPELL_KEY, end);
    } else {
        de_nfa_chars(&f, in, string_chars, 3, in);
        if (in_call)
            no_tags(&f, in);
    }
    uint16_t *marks = NULL;
    const uint32_t base = de_nfa_subsets(&f, in, end, &marks);
    de_nfa_done(&f);
    if (!a->code)
        mark_nodes(a, base, pattern ? UINT32_MAX : base, marks, DE_NODE_KEY, arg);
    free(marks);
    return base;
}

uint32_t de_json_members(de_json_rules *j, uint32_t value, const delta_str *names, uint32_t n_names,
                         const de_expr *pattern, uint32_t min, uint32_t max, uint32_t *ret_next)
{
    de_auto *a = j->a;
    const uint32_t space = de_json_space(j);
    de_expr *member = de_expr_list(a, DE_EXPR_SEQ);
    member = de_expr_add(member, de_expr_call(a, space));
    member = de_expr_add(member, de_expr_literal(a, ":"));
    member = de_expr_add(member, de_expr_call(a, space));
    member = de_expr_add(member, de_expr_call(a, value));
    member = de_expr_add(member, de_expr_call(a, space));
    de_object o = { .value = make(a, member),
                    .space = space,
                    .names = names,
                    .n_names = n_names,
                    .min = min,
                    .max = max };
    const uint32_t arg = DE_APPEND(a, objects, o);
    const uint32_t key = key_nodes(a, j->in_call, pattern, arg);
    /* first: '"' key; next: ',' space '"' key */
    const uint32_t quote_edge = DE_APPEND(a, edges, (de_edge){ '"', '"', key });
    const uint32_t quote = DE_APPEND(
        a, nodes,
        (de_node){ .kind = DE_NODE_MEMBER, .n_edges = 1, .edges = quote_edge, .arg = arg });
    const uint32_t space_call = DE_APPEND(a, calls, (de_call){ space, quote });
    const uint32_t comma = DE_APPEND(
        a, nodes,
        (de_node){ .kind = DE_NODE_MEMBER, .n_calls = 1, .calls = space_call, .arg = arg });
    const uint32_t comma_edge = DE_APPEND(a, edges, (de_edge){ ',', ',', comma });
    const uint32_t next = DE_APPEND(a, nodes,
                                    (de_node){ .kind = DE_NODE_MEMBER,
                                               .flags = DE_NODE_ACCEPT,
                                               .n_edges = 1,
                                               .edges = comma_edge,
                                               .arg = arg });
    const uint32_t first = DE_APPEND(a, nodes,
                                     (de_node){ .kind = DE_NODE_MEMBER,
                                                .flags = DE_NODE_ACCEPT,
                                                .n_edges = 1,
                                                .edges = quote_edge,
                                                .arg = arg });
    if (a->code)
        return 0;
    a->objects[arg].next_node = next;
    *ret_next = DE_APPEND(a, rules, next);
    return DE_APPEND(a, rules, first);
}

/* ---- any value */

static uint32_t any_array_at(de_json_rules *j, int depth);
static uint32_t any_object_at(de_json_rules *j, int depth);

/* Values of at most this many levels. */
static uint32_t any_at(de_json_rules *j, int depth)
{
    de_auto *a = j->a;
    if (j->any[depth] != UINT32_MAX || a->code)
        return j->any[depth];
    de_expr *alt = de_expr_list(a, DE_EXPR_ALT);
    static const char *const words[] = { "null", "true", "false" };
    for (size_t i = 0; i < 3; i++)
        alt = de_expr_add(alt, de_expr_literal(a, words[i]));
    alt = de_expr_add(alt, de_expr_call(a, de_json_string(j, 0, DE_MANY)));
    alt = de_expr_add(alt, de_expr_call(a, de_json_number(j)));
    if (depth > 0) {
        alt = de_expr_add(alt, de_expr_call(a, any_array_at(j, depth)));
        alt = de_expr_add(alt, de_expr_call(a, any_object_at(j, depth)));
    }
    return j->any[depth] = make(a, alt);
}

static uint32_t any_array_at(de_json_rules *j, int depth)
{
    de_auto *a = j->a;
    const uint32_t value = any_at(j, depth - 1), space = de_json_space(j);
    de_expr *item = de_expr_seq2(a, de_expr_call(a, value), de_expr_call(a, space));
    de_expr *more = de_expr_list(a, DE_EXPR_SEQ);
    more = de_expr_add(more, de_expr_literal(a, ","));
    more = de_expr_add(more, de_expr_call(a, space));
    more = de_expr_add(more, de_expr_call(a, value));
    more = de_expr_add(more, de_expr_call(a, space));
    de_expr *e = de_expr_list(a, DE_EXPR_SEQ);
    e = de_expr_add(e, de_expr_literal(a, "["));
    e = de_expr_add(e, de_expr_call(a, space));
    e = de_expr_add(
        e, de_expr_repeat(a, de_expr_seq2(a, item, de_expr_repeat(a, more, 0, DE_MANY)), 0, 1));
    return make(a, de_expr_add(e, de_expr_literal(a, "]")));
}

static uint32_t any_object_at(de_json_rules *j, int depth)
{
    de_auto *a = j->a;
    uint32_t next = 0;
    const uint32_t members =
        de_json_members(j, any_at(j, depth - 1), NULL, 0, NULL, 0, DE_MANY, &next);
    de_expr *e = de_expr_list(a, DE_EXPR_SEQ);
    e = de_expr_add(e, de_expr_literal(a, "{"));
    e = de_expr_add(e, de_expr_call(a, de_json_space(j)));
    e = de_expr_add(e, de_expr_call(a, members));
    return make(a, de_expr_add(e, de_expr_literal(a, "}")));
}

uint32_t de_json_any(de_json_rules *j)
{
    return any_at(j, DE_ANY_DEPTH);
}

uint32_t de_json_any_object(de_json_rules *j)
{
    return any_object_at(j, DE_ANY_DEPTH);
}

uint32_t de_json_any_array(de_json_rules *j)
{
    return any_array_at(j, DE_ANY_DEPTH);
}

/* ---- numbers with bounds
 *
 * A bound is an integer once it is multiplied by 10^k, k the digits behind the
 * point. A number of j <= k digits behind the point is in the bounds if its
 * digits, read as an integer, are between the bounds rounded to j digits; one
 * of more digits is if its first k are, with care at the very bounds. So all
 * comes down to digit strings of an integer between two others, with a point
 * somewhere. */

typedef unsigned long long wide;
enum { SCALE_MAX = 15 };

/* A decimal: value = sign * n / 10^k. */
typedef struct decimal {
    bool minus;
    wide n;
    uint32_t k;
} decimal;

static bool read_decimal(const char *s, decimal *ret)
{
    decimal d = { .minus = *s == '-' };
    s += d.minus;
    uint32_t n_digits = 0;
    bool point = false;
    for (; (*s >= '0' && *s <= '9') || *s == '.'; s++) {
        if (*s == '.') {
            point = true;
            continue;
        }
        n_digits += d.n || *s != '0';
        if (n_digits > SCALE_MAX)
            return false;
        d.n = 10 * d.n + (wide)(*s - '0');
        d.k += point;
    }
    if (*s) { /* an exponent */
        const long e = strtol(s + 1, NULL, 10);
        if (e > SCALE_MAX || e < -SCALE_MAX)
            return false;
        for (long i = e; i < 0; i++)
            d.k++;
        for (long i = 0; i < e; i++) {
            if (d.k)
                d.k--;
            else if ((d.n *= 10) > 1000000000000000ull)
                return false;
        }
    }
    while (d.k && d.n % 10 == 0) {
        d.n /= 10;
        d.k--;
    }
    if (d.n == 0)
        d.minus = false;
    *ret = d;
    return d.k <= SCALE_MAX;
}

static wide power10(uint32_t k)
{
    wide p = 1;
    while (k--)
        p *= 10;
    return p;
}

typedef struct digit_maker {
    de_auto *a;
    uint32_t n;     /* digits */
    uint32_t point; /* a point stands before that one; n: none */
} digit_maker;

static de_expr *digit(const digit_maker *m, uint32_t at, unsigned lo, unsigned hi)
{
    de_expr *d = bytes_between(m->a, '0' + lo, '0' + hi);
    return at == m->point && at > 0 ? de_expr_seq2(m->a, de_expr_literal(m->a, "."), d) : d;
}

static de_expr *all_digits(const digit_maker *m, uint32_t at)
{
    de_expr *e = de_expr_list(m->a, DE_EXPR_SEQ);
    for (; at < m->n; at++)
        e = de_expr_add(e, digit(m, at, 0, 9));
    return e;
}

static bool all_are(const digit_maker *m, uint32_t at, const char *digits_, char c)
{
    for (; at < m->n; at++)
        if (digits_[at] != c)
            return false;
    return true;
}

/* Digit strings from `at` on that are lo .. hi, both of the same number of digits. */
static de_expr *digits_between(const digit_maker *m, uint32_t at, const char *lo, const char *hi)
{
    static const char zeros[] = "00000000000000000000", nines[] = "99999999999999999999";
    if (at == m->n || (all_are(m, at, lo, '0') && all_are(m, at, hi, '9')))
        return all_digits(m, at);
    unsigned a = (unsigned)(lo[at] - '0'), b = (unsigned)(hi[at] - '0');
    if (a == b)
        return de_expr_seq2(m->a, digit(m, at, a, a), digits_between(m, at + 1, lo, hi));
    de_expr *e = de_expr_list(m->a, DE_EXPR_ALT);
    if (!all_are(m, at + 1, lo, '0')) {
        e = de_expr_add(
            e, de_expr_seq2(m->a, digit(m, at, a, a), digits_between(m, at + 1, lo, nines)));
        a++;
    }
    if (!all_are(m, at + 1, hi, '9')) {
        e = de_expr_add(
            e, de_expr_seq2(m->a, digit(m, at, b, b), digits_between(m, at + 1, zeros, hi)));
        b--;
    }
    if (a <= b)
        e = de_expr_add(e, de_expr_seq2(m->a, digit(m, at, a, b), all_digits(m, at + 1)));
    return e;
}

/* lo .. hi of integers, the last `k` digits behind a point. */
static de_expr *scaled_between(de_auto *a, wide lo, wide hi, uint32_t k)
{
    de_expr *alt = de_expr_list(a, DE_EXPR_ALT);
    for (uint32_t n = k + 1; n <= 19; n++) {
        const wide least = n == k + 1 ? 0 : power10(n - 1), most = power10(n) - 1;
        const wide x = lo > least ? lo : least, y = hi < most ? hi : most;
        if (x > y)
            continue;
        char from[32], to[32];
        (void)snprintf(from, sizeof from, "%0*llu", (int)n, x);
        (void)snprintf(to, sizeof to, "%0*llu", (int)n, y);
        const digit_maker m = { a, n, k ? n - k : n };
        alt = de_expr_add(alt, digits_between(&m, 0, from, to));
    }
    return alt;
}

static const wide NO_BOUND = 999999999999999999ull;

/* Numbers lo .. hi that are not negative, bounds times 10^k; open: without the bound itself. */
static de_expr *positive_between(de_auto *a, wide lo, bool lo_open, wide hi, bool hi_open,
                                 uint32_t k, uint32_t decimals)
{
    de_expr *alt = de_expr_list(a, DE_EXPR_ALT);
    const wide from = lo + lo_open, to = hi - (hi_open && hi != NO_BOUND);
    if (hi_open && hi == 0)
        return de_expr_never(a);
    for (uint32_t j = 0; j <= k && j <= decimals; j++) {
        const wide unit = power10(k - j);
        const wide x = from / unit + (from % unit != 0), y = to / unit;
        if (x <= y)
            alt = de_expr_add(alt, scaled_between(a, x, y, j));
    }
    if (decimals <= k)
        return alt;
    /* more digits than the bounds have: [lo, hi) with any tail, hi with zeros, lo open with a tail
     * that is not zero */
    const uint32_t most = decimals == DE_MANY ? DIGITS_MAX : decimals - k;
    de_expr *zeros = de_expr_repeat(a, de_expr_literal(a, "0"), 1, most);
    const char *point = k ? "" : ".";
    if (hi > 0 && from <= hi - 1) {
        de_expr *tail = de_expr_seq2(a, de_expr_literal(a, point), digits(a, 1, most));
        alt = de_expr_add(alt, de_expr_seq2(a, scaled_between(a, from, hi - 1, k), tail));
    }
    if (!hi_open && hi != NO_BOUND && lo + lo_open <= hi) {
        de_expr *tail = de_expr_seq2(a, de_expr_literal(a, point), zeros);
        alt = de_expr_add(alt, de_expr_seq2(a, scaled_between(a, hi, hi, k), tail));
    }
    if (lo_open && lo < hi) {
        de_expr *tail = de_expr_list(a, DE_EXPR_SEQ);
        tail = de_expr_add(tail, de_expr_literal(a, point));
        tail = de_expr_add(tail, de_expr_repeat(a, de_expr_literal(a, "0"), 0, most - 1));
        tail = de_expr_add(tail, bytes_between(a, '1', '9'));
        alt = de_expr_add(alt, de_expr_seq2(a, scaled_between(a, lo, lo, k), tail));
    }
    return alt;
}

de_expr *de_number_between(de_auto *a, const de_bounds *b, const char **ret_why)
{
    decimal lo = { .minus = true, .n = NO_BOUND }, hi = { .n = NO_BOUND };
    if ((b->lo && !read_decimal(b->lo, &lo)) || (b->hi && !read_decimal(b->hi, &hi))) {
        *ret_why = "a bound of more than 15 digits";
        return NULL;
    }
    const uint32_t k = lo.k > hi.k ? lo.k : hi.k;
    wide x = lo.n, y = hi.n;
    const wide limit = NO_BOUND / power10(k);
    if ((b->lo && x > limit) || (b->hi && y > limit)) {
        *ret_why = "bounds of more than 15 digits together";
        return NULL;
    }
    x = b->lo ? x * power10(k - lo.k) : NO_BOUND;
    y = b->hi ? y * power10(k - hi.k) : NO_BOUND;
    de_expr *alt = de_expr_list(a, DE_EXPR_ALT);
    /* at or above 0 */
    if (!hi.minus && (lo.minus || x <= y))
        alt = de_expr_add(alt, positive_between(a, lo.minus ? 0 : x, !lo.minus && b->lo_open, y,
                                                b->hi_open, k, b->decimals));
    /* below 0: the bounds change places; -0 is left out */
    if (lo.minus && (!hi.minus || y <= x)) {
        de_expr *e = positive_between(a, hi.minus ? y : 0, !hi.minus || b->hi_open, x, b->lo_open,
                                      k, b->decimals);
        alt = de_expr_add(alt, de_expr_seq2(a, de_expr_literal(a, "-"), e));
    }
    return alt;
}

uint32_t de_integer_multiple(de_auto *a, uint32_t k)
{
    de_nfa f = { .a = a };
    const uint32_t start = de_nfa_state(&f, 0), sign = de_nfa_state(&f, 0),
                   end = de_nfa_state(&f, 0);
    de_nfa_epsilon(&f, start, sign);
    de_nfa_byte(&f, start, '-', '-', sign);
    de_nfa_byte(&f, sign, '0', '0', end);
    uint32_t first = 0;
    for (uint32_t r = 0; r < k; r++) {
        const uint32_t s = de_nfa_state(&f, 0);
        first = r ? first : s;
    }
    for (uint32_t d = 1; d < 10; d++)
        de_nfa_byte(&f, sign, (uint8_t)('0' + d), (uint8_t)('0' + d), first + d % k);
    for (uint32_t r = 0; r < k && !a->code; r++)
        for (uint32_t d = 0; d < 10; d++)
            de_nfa_byte(&f, first + r, (uint8_t)('0' + d), (uint8_t)('0' + d),
                        first + (10 * r + d) % k);
    de_nfa_epsilon(&f, first, end);
    const uint32_t rule = de_rule_new(a);
    de_rule_make_nfa(a, rule, &f, start, end);
    return rule;
}
