/* auto.c -- see auto.h: expressions, rules, and what is cut off. */
#include "grammar/auto.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

/* ---- memory and limits */

void de_auto_init(de_auto *a, de_arena *arena, uint64_t deadline_ns)
{
    *a = (de_auto){ .arena = arena, .deadline_ns = deadline_ns };
}

void de_auto_done(de_auto *a)
{
    for (uint32_t i = 0; i < a->n_wides; i++) {
        free(a->wides[i].inside);
        free(a->wides[i].exits);
    }
    free(a->nodes);
    free(a->edges);
    free(a->calls);
    free(a->rules);
    free(a->counts);
    free(a->strings);
    free(a->objects);
    free(a->texts);
    free(a->wides);
}

bool de_auto_ok(de_auto *a)
{
    if (!a->code && a->n_nodes > DELTA_GRAMMAR_NODES)
        a->code = DELTA_ELIMIT;
    if (!a->code && a->deadline_ns && de_now_ns() > a->deadline_ns)
        a->code = DELTA_ELIMIT;
    return !a->code;
}

void *de_auto_grow(de_auto *a, void *p, uint32_t n, uint32_t *cap, size_t size)
{
    if (n < *cap || a->code)
        return p;
    const uint32_t more = *cap ? 2 * *cap : 64;
    if (more > 16u << 20) {
        a->code = DELTA_ELIMIT;
        return p;
    }
    void *grown = realloc(p, more * size);
    if (!grown) {
        a->code = DELTA_ENOMEM;
        return p;
    }
    *cap = more;
    return grown;
}

/* ---- expressions */

static de_expr *expr(de_auto *a, de_expr e)
{
    de_expr *p = de_arena_alloc(a->arena, sizeof *p);
    if (p)
        *p = e;
    else if (!a->code)
        a->code = DELTA_ELIMIT;
    return p;
}

de_expr *de_expr_bytes(de_auto *a, const char *p, size_t len)
{
    return expr(a, (de_expr){ .kind = DE_EXPR_BYTES, .bytes = { p, len } });
}

de_expr *de_expr_literal(de_auto *a, const char *text)
{
    return de_expr_bytes(a, text, strlen(text));
}

static int by_lo(const void *x, const void *y)
{
    const de_range *a = x, *b = y;
    return a->lo < b->lo ? -1 : a->lo > b->lo;
}

de_expr *de_expr_chars(de_auto *a, const de_range *r, uint32_t n)
{
    de_range *own = de_arena_array(a->arena, n ? n : 1, sizeof *own);
    if (!own) {
        a->code = a->code ? a->code : DELTA_ELIMIT;
        return NULL;
    }
    if (n)
        memcpy(own, r, n * sizeof *own);
    qsort(own, n, sizeof *own, by_lo);
    uint32_t k = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (k && own[i].lo <= own[k - 1].hi + 1)
            own[k - 1].hi = own[i].hi > own[k - 1].hi ? own[i].hi : own[k - 1].hi;
        else
            own[k++] = own[i];
    }
    return expr(a, (de_expr){ .kind = DE_EXPR_CHARS, .ranges = own, .n_ranges = k });
}

de_expr *de_expr_list(de_auto *a, enum de_expr_kind kind)
{
    return expr(a, (de_expr){ .kind = kind });
}

de_expr *de_expr_add(de_expr *list, de_expr *e)
{
    if (!list || !e)
        return NULL;
    if (list->last)
        list->last->next = e;
    else
        list->child = e;
    list->last = e;
    return list;
}

de_expr *de_expr_repeat(de_auto *a, de_expr *e, uint32_t min, uint32_t max)
{
    return e ? expr(a, (de_expr){ .kind = DE_EXPR_REPEAT, .min = min, .max = max, .child = e })
             : NULL;
}

de_expr *de_expr_call(de_auto *a, uint32_t rule)
{
    return expr(a, (de_expr){ .kind = DE_EXPR_CALL, .rule = rule });
}

de_expr *de_expr_seq2(de_auto *a, de_expr *x, de_expr *y)
{
    return de_expr_add(de_expr_add(de_expr_list(a, DE_EXPR_SEQ), x), y);
}

de_expr *de_expr_never(de_auto *a)
{
    return expr(a, (de_expr){ .kind = DE_EXPR_NEVER });
}

/* ---- rules */

uint32_t de_rule_new(de_auto *a)
{
    return DE_APPEND(a, rules, UINT32_MAX);
}

void de_rule_make_nfa(de_auto *a, uint32_t rule, de_nfa *f, uint32_t start, uint32_t end)
{
    const uint32_t node = de_nfa_subsets(f, start, end, NULL);
    de_nfa_done(f);
    if (!a->code)
        a->rules[rule] = node;
}

void de_rule_make(de_auto *a, uint32_t rule, const de_expr *e, enum de_spelling spelling)
{
    de_nfa f = { .a = a };
    const uint32_t start = de_nfa_state(&f, 0), end = de_nfa_state(&f, 0);
    de_nfa_expr(&f, start, e, spelling, end);
    de_rule_make_nfa(a, rule, &f, start, end);
}

uint32_t de_rule_of_node(de_auto *a, enum de_node_kind kind, unsigned flags, uint32_t arg)
{
    const uint32_t node = DE_APPEND(
        a, nodes, (de_node){ .kind = (uint8_t)kind, .flags = (uint8_t)flags, .arg = arg });
    return DE_APPEND(a, rules, node);
}

uint32_t de_rule_count(de_auto *a, uint32_t first, uint32_t next, uint32_t min, uint32_t max)
{
    const uint32_t arg = DE_APPEND(a, counts, (de_count){ first, next, min, max });
    return de_rule_of_node(a, DE_NODE_COUNT, 0, arg);
}

const de_edge *de_node_edge(const de_auto *a, const de_node *n, uint8_t byte)
{
    const de_edge *e = a->edges + n->edges, *end = e + n->n_edges;
    if (n->n_edges > 8) {
        while (e < end) {
            const de_edge *mid = e + (end - e) / 2;
            if (byte < mid->lo)
                end = mid;
            else if (byte > mid->hi)
                e = mid + 1;
            else
                return mid;
        }
        return NULL;
    }
    for (; e < end && e->lo <= byte; e++)
        if (byte <= e->hi)
            return e;
    return NULL;
}

/* ---- what leads nowhere */

static bool live(const de_auto *a, uint32_t node)
{
    return node != UINT32_MAX && !(a->nodes[node].flags & DE_NODE_DEAD);
}

static bool rule_live(const de_auto *a, uint32_t rule)
{
    return live(a, a->rules[rule]);
}

/* Can a rule end from this node on, as far as is known? */
static bool ends(const de_auto *a, const de_node *n)
{
    if (n->flags & DE_NODE_ACCEPT)
        return true;
    switch ((enum de_node_kind)n->kind) {
    case DE_NODE_COUNT: {
        const de_count *c = &a->counts[n->arg];
        if (c->min == 0)
            return true;
        return c->max > 0 && c->min <= c->max && rule_live(a, c->first) &&
               (c->min == 1 || rule_live(a, c->next));
    }
    case DE_NODE_MEMBER:
        return a->objects[n->arg].min == 0 || rule_live(a, a->objects[n->arg].value);
    case DE_NODE_KEY:
        return rule_live(a, a->objects[n->arg].value);
    case DE_NODE_TEXT:
    case DE_NODE_PARAMS: /* its rules are looked at one by one */
        return true;
    case DE_NODE_PLAIN:
    case DE_NODE_STRING:
        break;
    }
    for (uint32_t i = 0; i < n->n_edges; i++)
        if (live(a, a->edges[n->edges + i].to))
            return true;
    for (uint32_t i = 0; i < n->n_calls; i++)
        if (rule_live(a, a->calls[n->calls + i].rule) && live(a, a->calls[n->calls + i].ret))
            return true;
    return false;
}

void de_auto_trim(de_auto *a)
{
    for (uint32_t i = 0; i < a->n_nodes; i++)
        a->nodes[i].flags |= DE_NODE_DEAD;
    for (bool more = true; more && de_auto_ok(a);) {
        more = false;
        for (uint32_t i = a->n_nodes; i-- > 0;)
            if (a->nodes[i].flags & DE_NODE_DEAD && ends(a, &a->nodes[i])) {
                a->nodes[i].flags &= (uint8_t)~DE_NODE_DEAD;
                more = true;
            }
    }
    for (uint32_t i = 0; i < a->n_nodes; i++) {
        de_node *n = &a->nodes[i];
        uint16_t edges = 0;
        uint32_t calls = 0;
        for (uint32_t k = 0; k < n->n_edges; k++)
            if (live(a, a->edges[n->edges + k].to))
                a->edges[n->edges + edges++] = a->edges[n->edges + k];
        for (uint32_t k = 0; k < n->n_calls; k++) {
            const de_call c = a->calls[n->calls + k];
            if (rule_live(a, c.rule) && live(a, c.ret))
                a->calls[n->calls + calls++] = c;
        }
        n->n_edges = edges;
        n->n_calls = calls;
    }
    for (uint32_t i = 0; i < a->n_counts; i++) {
        de_count *c = &a->counts[i];
        if (!rule_live(a, c->first))
            c->max = 0;
        else if (!rule_live(a, c->next) && c->max > 1)
            c->max = 1;
    }
    for (uint32_t i = 0; i < a->n_objects; i++)
        if (!rule_live(a, a->objects[i].value))
            a->objects[i].max = 0;
}

bool de_rule_matches(const de_auto *a, uint32_t rule)
{
    return rule_live(a, rule);
}

/* ---- left recursion */

typedef struct first_search {
    const de_auto *a;
    uint8_t *nullable; /* of each rule */
    uint8_t *state;    /* of each rule: 0 not seen, 1 on the path, 2 done */
    uint8_t *seen;     /* of each node */
} first_search;

enum { FIRST_DEPTH = 4096 };

/* The node can be left without reading a byte. */
static bool passes(const first_search *s, uint32_t node, unsigned depth)
{
    const de_node *n = &s->a->nodes[node];
    if (n->flags & DE_NODE_ACCEPT)
        return true;
    if (n->kind == DE_NODE_COUNT) {
        const de_count *c = &s->a->counts[n->arg];
        return c->min == 0 || (s->nullable[c->first] && s->nullable[c->next]);
    }
    if (n->kind == DE_NODE_MEMBER)
        return s->a->objects[n->arg].min == 0;
    for (uint32_t i = 0; i < n->n_calls; i++) {
        const de_call *c = &s->a->calls[n->calls + i];
        if (s->nullable[c->rule] && depth < FIRST_DEPTH && passes(s, c->ret, depth + 1))
            return true;
    }
    return false;
}

/* Rules that may run before the next byte is read; a cycle among them is the answer. */
static uint32_t search_rule(first_search *s, uint32_t rule, unsigned depth);

static uint32_t search_node(first_search *s, uint32_t node, unsigned depth)
{
    const de_node *n = &s->a->nodes[node];
    uint32_t found = UINT32_MAX;
    if (s->seen[node])
        return UINT32_MAX;
    s->seen[node] = 1;
    if (n->kind == DE_NODE_COUNT) {
        const de_count *c = &s->a->counts[n->arg];
        found = search_rule(s, c->first, depth);
        if (found == UINT32_MAX && s->nullable[c->first])
            found = search_rule(s, c->next, depth);
    }
    for (uint32_t i = 0; i < n->n_calls && found == UINT32_MAX; i++) {
        const de_call *c = &s->a->calls[n->calls + i];
        found = search_rule(s, c->rule, depth);
        if (found == UINT32_MAX && s->nullable[c->rule])
            found = search_node(s, c->ret, depth + 1);
    }
    return found;
}

static uint32_t search_rule(first_search *s, uint32_t rule, unsigned depth)
{
    if (s->state[rule] == 2 || s->a->rules[rule] == UINT32_MAX)
        return UINT32_MAX;
    if (s->state[rule] == 1 || depth > FIRST_DEPTH)
        return rule;
    s->state[rule] = 1;
    const uint32_t found = search_node(s, s->a->rules[rule], depth + 1);
    s->state[rule] = 2;
    return found;
}

uint32_t de_auto_left_recursion(de_auto *a)
{
    first_search s = { .a = a,
                       .nullable = calloc(a->n_rules + 1, 1),
                       .state = calloc(a->n_rules + 1, 1),
                       .seen = calloc(a->n_nodes + 1, 1) };
    const bool have_all = s.nullable && s.state && s.seen;
    uint32_t found = UINT32_MAX;
    if (!have_all)
        a->code = DELTA_ENOMEM;
    for (bool more = have_all; more;) {
        more = false;
        for (uint32_t r = 0; r < a->n_rules; r++)
            if (!s.nullable[r] && a->rules[r] != UINT32_MAX && passes(&s, a->rules[r], 0))
                s.nullable[r] = more = 1;
    }
    for (uint32_t r = 0; have_all && found == UINT32_MAX && r < a->n_rules; r++)
        found = search_rule(&s, r, 0);
    free(s.nullable);
    free(s.state);
    free(s.seen);
    return found;
}
