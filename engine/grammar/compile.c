/* compile.c -- a spec to a grammar; see delta/grammar.h. */
#include "grammar/compile.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/sha256.h"
#include "base/utf8.h"
#include "grammar/notation.h"
#include "grammar/regex.h"

enum { WIDE_TOKENS = 2000, WIDE_MAX = 256, WIDE_TIME_MS = 1000 };

/* ---- states that let very many tokens pass */

typedef struct widener {
    const de_auto *a;
    const de_trie *t;
    uint32_t **next; /* of each node: by byte, UINT32_MAX for none; made when it is first met */
    uint32_t node[DELTA_GRAMMAR_TOKEN_BYTES + 1];
    uint32_t *inside; /* NULL: only count */
    uint32_t n_tokens;
    uint32_t *sum; /* of each rank: tokens inside before it */
    de_wide_exit *exits;
    uint32_t n_exits, cap_exits;
    bool failed;
} widener;

static const uint32_t *row(widener *w, uint32_t node)
{
    if (w->next[node])
        return w->next[node];
    uint32_t *to = malloc(256 * sizeof *to);
    if (!to) {
        static const uint32_t none[256];
        w->failed = true;
        return none;
    }
    memset(to, 0xFF, 256 * sizeof *to);
    const de_node *n = &w->a->nodes[node];
    for (uint32_t k = 0; k < n->n_edges; k++)
        for (unsigned b = w->a->edges[n->edges + k].lo; b <= w->a->edges[n->edges + k].hi; b++)
            to[b] = w->a->edges[n->edges + k].to;
    return w->next[node] = to;
}

static bool leads_on(const de_node *n)
{
    return n->flags & DE_NODE_ACCEPT || n->n_calls > 0;
}

static void add_exit(widener *w, uint32_t child, uint32_t node)
{
    if (w->n_exits == w->cap_exits) {
        const uint32_t cap = w->cap_exits ? 2 * w->cap_exits : 1024;
        de_wide_exit *more = realloc(w->exits, cap * sizeof *more);
        if (!more) {
            w->failed = true;
            return;
        }
        w->exits = more;
        w->cap_exits = cap;
    }
    w->exits[w->n_exits++] = (de_wide_exit){ node, child, w->t->nodes[child].byte };
}

/* Drops the exits below which all tokens stay inside anyway. */
static void prune_exits(widener *w)
{
    const de_trie *t = w->t;
    w->sum[0] = 0;
    for (uint32_t r = 0; r < t->n_order; r++)
        w->sum[r + 1] = w->sum[r] + de_bit(w->inside, t->order[r]);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < w->n_exits; i++) {
        const uint32_t c = w->exits[i].child;
        const uint32_t lo = t->nodes[c].rank, hi = t->nodes[t->nodes[c].skip].rank;
        if (w->sum[hi] - w->sum[lo] < hi - lo)
            w->exits[kept++] = w->exits[i];
    }
    w->n_exits = kept;
}

/* All tokens from this node on, as long as they stay in its rule; stops early where it only counts. */
static void widen(widener *w, uint32_t from, uint32_t enough)
{
    const de_trie *t = w->t;
    w->node[0] = from;
    w->n_tokens = w->n_exits = 0;
    for (uint32_t i = 1; i < t->n && !w->failed && (w->inside || w->n_tokens < enough);) {
        const de_trie_node *node = &t->nodes[i];
        const uint32_t to = row(w, w->node[node->depth - 1])[node->byte];
        if (to == UINT32_MAX) {
            i = node->skip;
            continue;
        }
        w->node[node->depth] = to;
        w->n_tokens += node->n_here;
        for (uint32_t k = 0; w->inside && k < node->n_here; k++)
            de_bit_set(w->inside, t->order[node->rank + k]);
        if (w->inside && leads_on(&w->a->nodes[to]))
            for (uint32_t c = i + 1; c < node->skip; c = t->nodes[c].skip)
                add_exit(w, c, to);
        i++;
    }
}

static int by_node(const void *x, const void *y)
{
    const de_wide_exit *a = x, *b = y;
    if (a->node != b->node)
        return a->node < b->node ? -1 : 1;
    if (a->byte != b->byte)
        return a->byte < b->byte ? -1 : 1;
    return a->child < b->child ? -1 : a->child > b->child;
}

int de_wides_make(delta_grammar *g, delta_error *err)
{
    de_auto *a = &g->a;
    const uint64_t deadline = de_now_ns() + (uint64_t)WIDE_TIME_MS * 1000000;
    widener w = { .a = a, .t = &g->vocab->trie, .next = calloc(a->n_nodes + 1, sizeof *w.next) };
    w.sum = malloc(((size_t)w.t->n_order + 1) * sizeof *w.sum);
    w.failed = !w.next || !w.sum;
    for (uint32_t i = 0; i < a->n_nodes && a->n_wides < WIDE_MAX && !a->code && !w.failed; i++) {
        const de_node *n = &a->nodes[i];
        unsigned bytes = 0;
        for (uint32_t k = 0; k < n->n_edges; k++)
            bytes += a->edges[n->edges + k].hi - a->edges[n->edges + k].lo + 1u;
        if (n->kind != DE_NODE_PLAIN || bytes < 16 || de_now_ns() > deadline)
            continue;
        widen(&w, i, WIDE_TOKENS);
        if (w.n_tokens < WIDE_TOKENS)
            continue;
        w.inside = calloc(g->vocab->words, sizeof *w.inside);
        w.failed |= !w.inside;
        if (w.inside)
            widen(&w, i, 0);
        if (!w.failed) {
            prune_exits(&w);
            if (w.n_exits)
                qsort(w.exits, w.n_exits, sizeof *w.exits, by_node);
            const uint32_t k = DE_APPEND(a, wides, (de_wide){ w.inside, w.exits, w.n_exits });
            if (!a->code) {
                a->nodes[i].wide = k + 1;
                w.inside = NULL;
                w.exits = NULL;
                w.cap_exits = 0;
            }
        }
        free(w.inside);
        w.inside = NULL;
    }
    free(w.exits);
    for (uint32_t i = 0; w.next && i < a->n_nodes; i++)
        free(w.next[i]);
    free(w.next);
    free(w.sum);
    if (w.failed || a->code)
        return delta_fail(err, DELTA_ENOMEM, "grammar: masks of %u states", a->n_wides);
    return 0;
}

/* ---- content */

int de_spec_json(delta_grammar *g, delta_str text, const char *where, de_json **ret_v,
                 delta_error *err)
{
    int e = de_json_parse(&g->arena, text.p, text.len, ret_v, err);
    if (e < 0) {
        delta_error_prefix(err, "%s", where);
        e = e == DELTA_EFORMAT    ? DELTA_EINVALID
            : g->arena.is_starved ? DELTA_ENOMEM
                                  : DELTA_ELIMIT; /* the arena is the budget */
        if (err)
            err->code = e;
    }
    return e;
}

static int choices_rule(delta_grammar *g, const delta_grammar_spec *spec, uint32_t *ret_rule,
                        delta_error *err)
{
    de_auto *a = &g->a;
    if (spec->n_choices == 0 || spec->n_choices > DELTA_GRAMMAR_CHOICES)
        return delta_fail(err, DELTA_EINVALID, "%zu choices, not 1..%d", spec->n_choices,
                          DELTA_GRAMMAR_CHOICES);
    de_expr *alt = de_expr_list(a, DE_EXPR_ALT);
    for (size_t i = 0; i < spec->n_choices; i++) {
        const delta_str s = spec->choices[i];
        size_t at = 0;
        for (size_t n; at < s.len && (n = de_utf8_len(s.p + at, s.len - at)) > 0;)
            at += n;
        if (s.len == 0 || at < s.len)
            return delta_fail(err, DELTA_EINVALID, "choices[%zu] is %s", i,
                              s.len ? "no UTF-8" : "empty");
        alt = de_expr_add(alt, de_expr_bytes(a, s.p, s.len));
    }
    *ret_rule = de_rule_new(a);
    if (!a->code)
        de_rule_make(a, *ret_rule, alt, DE_SPELL_PLAIN);
    return 0;
}

static int content_rule(delta_grammar *g, const delta_grammar_spec *spec, uint32_t *ret_rule,
                        delta_error *err)
{
    de_auto *a = &g->a;
    de_json_rules j;
    de_json_rules_init(&j, a, false);
    int e = 0;
    switch (spec->content) {
    case DELTA_CONTENT_FREE:
        break;
    case DELTA_CONTENT_JSON:
        *ret_rule = de_json_any_object(&j);
        break;
    case DELTA_CONTENT_SCHEMA: {
        de_json *v = NULL;
        e = de_spec_json(g, spec->text, "schema", &v, err);
        if (e == 0)
            e = de_schema_rule(&j, v, v, "schema", ret_rule, err);
        break;
    }
    case DELTA_CONTENT_REGEX: {
        de_expr *expr = NULL;
        e = de_regex_read(a, spec->text.p, spec->text.len, false, &expr, err);
        if (e < 0) {
            delta_error_prefix(err, "regex");
            break;
        }
        *ret_rule = de_rule_new(a);
        if (!a->code)
            de_rule_make(a, *ret_rule, expr, DE_SPELL_PLAIN);
        break;
    }
    case DELTA_CONTENT_CHOICE:
        e = choices_rule(g, spec, ret_rule, err);
        break;
    case DELTA_CONTENT_GRAMMAR:
        e = de_notation_read(a, spec->text.p, spec->text.len, ret_rule, err);
        if (e < 0)
            delta_error_prefix(err, "grammar");
        break;
    }
    return e;
}

/* What comes behind "</think>": the template's newlines, then the content. */
static void make_turn(delta_grammar *g, uint32_t content)
{
    de_auto *a = &g->a;
    g->turn = content;
    if (!g->thinking || a->code)
        return;
    de_expr *lines = de_expr_repeat(a, de_expr_literal(a, "\n"), 0, 2);
    g->turn = de_rule_new(a);
    if (!a->code)
        de_rule_make(a, g->turn, de_expr_seq2(a, lines, de_expr_call(a, content)), DE_SPELL_PLAIN);
}

/* ---- the whole */

static int check_spec(const delta_grammar_spec *s, delta_error *err)
{
    uint64_t bytes = s->text.len;
    for (size_t i = 0; i < s->n_choices && bytes <= DELTA_GRAMMAR_TEXT_BYTES; i++)
        bytes += s->choices[i].len;
    for (size_t i = 0; i < s->n_tools && bytes <= DELTA_GRAMMAR_TEXT_BYTES; i++)
        bytes += s->tools_json[i].len;
    if (bytes > DELTA_GRAMMAR_TEXT_BYTES)
        return delta_fail(err, DELTA_ELIMIT, "grammar: more than %d bytes of text",
                          DELTA_GRAMMAR_TEXT_BYTES);
    if ((unsigned)s->content > DELTA_CONTENT_GRAMMAR || (unsigned)s->calls > DELTA_CALLS_REQUIRED)
        return delta_fail(err, DELTA_EINVALID, "grammar: no such form");
    if (s->calls != DELTA_CALLS_NONE && s->content != DELTA_CONTENT_FREE)
        return delta_fail(err, DELTA_EINVALID,
                          "a form of the content and calls of tools cannot be asked for together");
    if (s->n_tools > DELTA_GRAMMAR_TOOLS)
        return delta_fail(err, DELTA_ELIMIT, "%zu tools, at most %d", s->n_tools,
                          DELTA_GRAMMAR_TOOLS);
    return 0;
}

static int finish(delta_grammar *g, delta_error *err)
{
    de_auto *a = &g->a;
    uint32_t left = UINT32_MAX;
    if (!a->code)
        de_auto_trim(a);
    if (!a->code)
        left = de_auto_left_recursion(a);
    if (a->code == DELTA_ELIMIT && a->arena->is_starved)
        a->code = DELTA_ENOMEM;
    if (a->code == DELTA_ELIMIT)
        return delta_fail(err, DELTA_ELIMIT,
                          "grammar: more than %d states, %d MB or %d ms of compiling",
                          DELTA_GRAMMAR_NODES, DELTA_GRAMMAR_BYTES >> 20, DELTA_GRAMMAR_TIME_MS);
    if (a->code)
        return delta_fail(err, a->code, "grammar: %u states", a->n_nodes);
    if (left != UINT32_MAX)
        return delta_fail(err, DELTA_EINVALID, "grammar: a rule begins with itself");
    for (uint32_t i = 0; i < a->n_tools; i++)
        for (uint32_t k = 0; k < a->tools[i].n_params; k++) {
            const de_param_rule *p = &a->tools[i].params[k];
            if (p->required && !de_rule_matches(a, p->rule))
                return delta_fail(err, DELTA_EINVALID,
                                  "tools[%u].parameters.properties.%.*s: no value is possible", i,
                                  (int)p->name.len, p->name.p);
        }
    if (g->turn != UINT32_MAX && !de_rule_matches(a, g->turn))
        return delta_fail(err, DELTA_EINVALID, "grammar: nothing matches it");
    int e = de_wides_make(g, err);
    if (e == 0 && (e = de_cache_init(&g->cache, g->vocab->words)) < 0)
        e = delta_fail(err, e, "grammar: %d masks", DELTA_GRAMMAR_CACHE_MASKS);
    return e;
}

int delta_grammar_compile(const delta_grammar_vocab *v, const delta_grammar_spec *spec,
                          delta_grammar **ret_g, delta_error *err)
{
    assert(v && spec && ret_g);
    const uint64_t begin = de_now_ns();
    int e = check_spec(spec, err);
    if (e < 0)
        return e;
    delta_grammar *g = calloc(1, sizeof *g);
    if (!g)
        return delta_fail(err, DELTA_ENOMEM, "grammar");
    atomic_init(&g->refs, 1);
    g->vocab = de_vocab_ref(v);
    de_arena_init(&g->arena, DELTA_GRAMMAR_BYTES);
    de_auto_init(&g->a, &g->arena, begin + (uint64_t)DELTA_GRAMMAR_TIME_MS * 1000000);
    g->thinking = spec->thinking;
    g->watch_think = spec->content != DELTA_CONTENT_FREE;
    g->turn = UINT32_MAX;
    g->free_content = spec->content == DELTA_CONTENT_FREE && spec->calls != DELTA_CALLS_REQUIRED;
    if (spec->calls != DELTA_CALLS_NONE) {
        e = de_calls_compile(g, spec, err);
    } else if (spec->content != DELTA_CONTENT_FREE) {
        uint32_t content = 0;
        e = content_rule(g, spec, &content, err);
        if (e == 0)
            make_turn(g, content);
    }
    if (e == 0)
        e = finish(g, err);
    if (e < 0) {
        delta_grammar_free(g);
        return e;
    }
    g->compile_ns = de_now_ns() - begin;
    *ret_g = g;
    return 0;
}

delta_grammar *delta_grammar_ref(delta_grammar *g)
{
    atomic_fetch_add_explicit(&g->refs, 1, memory_order_relaxed);
    return g;
}

void delta_grammar_free(delta_grammar *g)
{
    if (!g || atomic_fetch_sub_explicit(&g->refs, 1, memory_order_acq_rel) != 1)
        return;
    de_cache_done(&g->cache);
    de_auto_done(&g->a);
    de_arena_done(&g->arena);
    delta_grammar_vocab_free(g->vocab);
    free(g);
}

/* ---- the key */

static void key_number(de_text *t, uint64_t n)
{
    char text[24];
    (void)snprintf(text, sizeof text, "%llu,", (unsigned long long)n);
    de_text_puts(t, text);
}

static void key_texts(de_text *t, const delta_str *s, size_t n)
{
    key_number(t, n);
    for (size_t i = 0; i < n; i++) {
        key_number(t, s[i].len);
        de_text_add(t, s[i].p, s[i].len);
    }
}

int delta_grammar_key(const delta_grammar_spec *s, char hex[65], delta_error *err)
{
    assert(s && hex);
    const bool calls = s->calls != DELTA_CALLS_NONE;
    de_text t = { 0 };
    key_number(&t, s->thinking);
    key_number(&t, s->content);
    key_number(&t, s->calls);
    key_texts(&t, &s->text, s->content != DELTA_CONTENT_FREE);
    key_texts(&t, s->choices, s->content == DELTA_CONTENT_CHOICE ? s->n_choices : 0);
    if (calls) {
        key_number(&t, s->calls_in_reasoning);
        key_number(&t, s->calls_in_fences);
        key_number(&t, s->parallel);
        key_texts(&t, s->tools_json, s->n_tools);
        key_texts(&t, s->allowed, s->n_allowed);
    }
    const bool failed = t.failed;
    if (!failed)
        de_sha256_hex(t.p, t.len, hex);
    de_text_done(&t);
    return failed ? delta_fail(err, DELTA_ENOMEM, "key of a grammar") : 0;
}
