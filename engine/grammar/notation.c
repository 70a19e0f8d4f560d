/* notation.c -- see notation.h: a reader by recursive descent. */
#include "grammar/notation.h"

#include <stdlib.h>
#include <string.h>

#include "grammar/regex.h"

typedef struct named {
    delta_str name;
    uint32_t rule;
    bool made;
    size_t used_at;
} named;

typedef struct notation {
    de_reader r;
    named *rules;
    uint32_t n_rules;
} notation;

static unsigned line_of(const notation *n, size_t at)
{
    unsigned line = 1;
    for (size_t i = 0; i < at && i < n->r.len; i++)
        line += n->r.s[i] == '\n';
    return line;
}

static de_expr *fail_at(notation *n, size_t at, const char *what)
{
    if (!n->r.a->code) {
        n->r.a->code = DELTA_EINVALID;
        (void)delta_fail(n->r.err, DELTA_EINVALID, "line %u: %s", line_of(n, at), what);
    }
    return NULL;
}

static de_expr *fail(notation *n, const char *what)
{
    return fail_at(n, n->r.at, what);
}

static void skip(notation *n)
{
    de_reader *r = &n->r;
    while (r->at < r->len) {
        if (r->s[r->at] == '#')
            while (r->at < r->len && r->s[r->at] != '\n')
                r->at++;
        else if (strchr(" \t\r\n", r->s[r->at]) && r->s[r->at])
            r->at++;
        else
            break;
    }
}

static bool accept(notation *n, const char *what)
{
    const size_t len = strlen(what);
    skip(n);
    if (n->r.len - n->r.at < len || memcmp(n->r.s + n->r.at, what, len) != 0)
        return false;
    n->r.at += len;
    return true;
}

static bool is_name(char c, bool first)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
           (!first && ((c >= '0' && c <= '9') || c == '-'));
}

static delta_str name_at(notation *n)
{
    skip(n);
    const de_reader *r = &n->r;
    size_t i = r->at;
    while (i < r->len && is_name(r->s[i], i == r->at))
        i++;
    return (delta_str){ r->s + r->at, i - r->at };
}

/* Is there "NAME ::=" here, the beginning of the next rule? */
static bool rule_begins(notation *n)
{
    const delta_str name = name_at(n);
    const size_t at = n->r.at;
    n->r.at += name.len;
    const bool is = name.len && accept(n, "::=");
    n->r.at = at;
    return is;
}

static named *find(notation *n, delta_str name)
{
    for (uint32_t i = 0; i < n->n_rules; i++)
        if (n->rules[i].name.len == name.len && memcmp(n->rules[i].name.p, name.p, name.len) == 0)
            return &n->rules[i];
    if (n->n_rules == DE_NOTATION_RULES) {
        (void)fail(n, "too many rules");
        return NULL;
    }
    n->rules[n->n_rules] = (named){ name, de_rule_new(n->r.a), false, n->r.at };
    return &n->rules[n->n_rules++];
}

static de_expr *literal(notation *n)
{
    de_reader *r = &n->r;
    de_expr *seq = de_expr_list(r->a, DE_EXPR_SEQ);
    while (seq) {
        uint32_t c;
        if (r->at >= r->len || r->s[r->at] == '\n')
            return fail(n, "no \" at the end");
        if (r->s[r->at] == '"') {
            r->at++;
            return seq;
        }
        const bool escaped = r->s[r->at] == '\\';
        r->at += escaped;
        if (!(escaped ? de_escape_read(r, &c) : de_char_read(r, &c)))
            return NULL;
        seq = de_expr_add(seq, de_expr_chars(r->a, &(de_range){ c, c }, 1));
    }
    return NULL;
}

/* "/regex/": up to the next slash that is not escaped. */
static de_expr *regex(notation *n)
{
    de_reader *r = &n->r;
    const size_t from = r->at;
    bool in_class = false;
    for (; r->at < r->len && r->s[r->at] != '\n'; r->at++) {
        if (r->s[r->at] == '\\' && r->at + 1 < r->len)
            r->at++;
        else if (r->s[r->at] == '[' || r->s[r->at] == ']')
            in_class = r->s[r->at] == '[';
        else if (r->s[r->at] == '/' && !in_class)
            break;
    }
    if (r->at >= r->len || r->s[r->at] != '/')
        return fail(n, "no / at the end");
    de_expr *e = NULL;
    if (de_regex_read(r->a, r->s + from, r->at - from, false, &e, r->err) < 0) {
        delta_error_prefix(r->err, "line %u", line_of(n, from));
        return NULL;
    }
    r->at++;
    return e;
}

static de_expr *alternatives(notation *n);

static de_expr *atom(notation *n)
{
    de_reader *r = &n->r;
    if (accept(n, "\""))
        return literal(n);
    if (accept(n, "["))
        return de_class_read(r);
    if (accept(n, "/"))
        return regex(n);
    if (accept(n, "."))
        return de_any_char(r->a);
    if (accept(n, "(")) {
        if (++r->depth > DELTA_GRAMMAR_DEPTH)
            return fail(n, "parentheses too deep");
        de_expr *e = alternatives(n);
        r->depth--;
        return e && !accept(n, ")") ? fail(n, "no )") : e;
    }
    const delta_str name = name_at(n);
    if (name.len == 0)
        return fail(n, "a literal, class, name or parenthesis is missing");
    named *rule = find(n, name);
    r->at += name.len;
    return rule ? de_expr_call(r->a, rule->rule) : NULL;
}

static de_expr *sequence(notation *n)
{
    de_reader *r = &n->r;
    de_expr *seq = de_expr_list(r->a, DE_EXPR_SEQ);
    for (skip(n); seq && r->at < r->len && !strchr("|);", r->s[r->at]) && !rule_begins(n);
         skip(n)) {
        de_expr *e = atom(n);
        seq = de_expr_add(seq, de_repeat_read(r, e));
    }
    return seq;
}

static de_expr *alternatives(notation *n)
{
    de_expr *alt = de_expr_list(n->r.a, DE_EXPR_ALT);
    do
        alt = de_expr_add(alt, sequence(n));
    while (alt && accept(n, "|"));
    return alt;
}

static void rule(notation *n)
{
    const delta_str name = name_at(n);
    const size_t at = n->r.at;
    n->r.at += name.len;
    if (name.len == 0 || !accept(n, "::=")) {
        (void)fail_at(n, at, "a rule (name ::= ...) is missing");
        return;
    }
    named *own = find(n, name);
    if (!own)
        return;
    if (own->made) {
        (void)fail_at(n, at, "a second rule of this name");
        return;
    }
    own->made = true;
    const uint32_t number = own->rule; /* the table does not move, but find() may add to it */
    const de_expr *e = alternatives(n);
    (void)accept(n, ";");
    if (e)
        de_rule_make(n->r.a, number, e, DE_SPELL_PLAIN);
    else if (!n->r.a->code)
        n->r.a->code = DELTA_ELIMIT;
}

int de_notation_read(de_auto *a, const char *text, size_t len, uint32_t *ret_rule, delta_error *err)
{
    if (err)
        err->code = 0;
    notation n = { .r = { .a = a, .s = text, .len = len, .err = err },
                   .rules = calloc(DE_NOTATION_RULES, sizeof(named)) };
    if (!n.rules)
        return delta_fail(err, DELTA_ENOMEM, "grammar");
    for (skip(&n); n.r.at < len && !a->code; skip(&n))
        rule(&n);
    uint32_t root = UINT32_MAX;
    for (uint32_t i = 0; i < n.n_rules && !a->code; i++) {
        if (!n.rules[i].made)
            (void)fail_at(&n, n.rules[i].used_at, "a rule of this name is missing");
        else if (n.rules[i].name.len == 4 && memcmp(n.rules[i].name.p, "root", 4) == 0)
            root = n.rules[i].rule;
    }
    if (!a->code && root == UINT32_MAX)
        (void)fail_at(&n, 0, "the rule root is missing");
    free(n.rules);
    if (a->code)
        return err && err->code ? err->code : delta_fail(err, a->code, "grammar of %zu bytes", len);
    *ret_rule = root;
    return 0;
}
