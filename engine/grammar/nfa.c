/* nfa.c -- see auto.h: nondeterministic automata, and their subsets. */
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "grammar/auto.h"

enum { EPSILON, BYTE, CALL };

uint32_t de_nfa_state(de_nfa *f, unsigned marks)
{
    if (f->n_states >= DELTA_GRAMMAR_NODES && !f->a->code)
        f->a->code = DELTA_ELIMIT;
    if (f->a->code)
        return 0;
    uint32_t *first = de_auto_grow(f->a, f->first, f->n_states, &f->cap_states, sizeof *f->first);
    if (first)
        f->first = first;
    uint16_t *m = de_auto_grow(f->a, f->marks, f->n_states, &f->cap_marks, sizeof *f->marks);
    if (m)
        f->marks = m;
    if (f->a->code)
        return 0;
    f->first[f->n_states] = UINT32_MAX;
    f->marks[f->n_states] = (uint16_t)marks;
    return f->n_states++;
}

static void add(de_nfa *f, uint32_t from, de_nfa_edge e)
{
    if (f->a->code)
        return;
    de_nfa_edge *edges = de_auto_grow(f->a, f->edges, f->n_edges, &f->cap_edges, sizeof *f->edges);
    if (edges)
        f->edges = edges;
    if (f->a->code) /* it did not grow */
        return;
    e.next = f->first[from];
    f->edges[f->n_edges] = e;
    f->first[from] = f->n_edges++;
}

void de_nfa_epsilon(de_nfa *f, uint32_t from, uint32_t to)
{
    add(f, from, (de_nfa_edge){ .kind = EPSILON, .to = to });
}

void de_nfa_call(de_nfa *f, uint32_t from, uint32_t rule, uint32_t to)
{
    add(f, from, (de_nfa_edge){ .kind = CALL, .rule = rule, .to = to });
}

void de_nfa_byte(de_nfa *f, uint32_t from, uint8_t lo, uint8_t hi, uint32_t to)
{
    add(f, from, (de_nfa_edge){ .kind = BYTE, .lo = lo, .hi = hi, .to = to });
}

static void bytes(de_nfa *f, uint32_t from, const char *p, size_t len, uint32_t to)
{
    if (len == 0) {
        de_nfa_epsilon(f, from, to);
        return;
    }
    for (size_t i = 0; i < len; i++) {
        const uint32_t next = i + 1 < len ? de_nfa_state(f, 0) : to;
        de_nfa_byte(f, from, (uint8_t)p[i], (uint8_t)p[i], next);
        from = next;
    }
}

void de_nfa_text(de_nfa *f, uint32_t from, const char *text, uint32_t to)
{
    bytes(f, from, text, strlen(text), to);
}

/* ---- characters */

/* All the characters of lo .. hi, which have n bytes each and differ from byte i on. */
static void utf8_range(de_nfa *f, uint32_t from, const uint8_t *lo, const uint8_t *hi, int n, int i,
                       uint32_t to)
{
    if (i == n - 1) {
        de_nfa_byte(f, from, lo[i], hi[i], to);
        return;
    }
    if (lo[i] == hi[i]) {
        const uint32_t next = de_nfa_state(f, 0);
        de_nfa_byte(f, from, lo[i], lo[i], next);
        utf8_range(f, next, lo, hi, n, i + 1, to);
        return;
    }
    uint8_t low[4], high[4];
    memset(low, 0x80, sizeof low);
    memset(high, 0xBF, sizeof high);
    uint8_t a = lo[i], b = hi[i];
    if (memcmp(lo + i + 1, low, (size_t)(n - i - 1)) != 0) {
        const uint32_t next = de_nfa_state(f, 0);
        de_nfa_byte(f, from, a, a, next);
        utf8_range(f, next, lo, high, n, i + 1, to);
        a++;
    }
    if (memcmp(hi + i + 1, high, (size_t)(n - i - 1)) != 0) {
        const uint32_t next = de_nfa_state(f, 0);
        de_nfa_byte(f, from, b, b, next);
        utf8_range(f, next, low, hi, n, i + 1, to);
        b--;
    }
    if (a <= b) {
        const uint32_t next = de_nfa_state(f, 0);
        de_nfa_byte(f, from, a, b, next);
        utf8_range(f, next, low, high, n, i + 1, to);
    }
}

static void char_range(de_nfa *f, uint32_t from, uint32_t lo, uint32_t hi, uint32_t to)
{
    static const uint32_t ends[] = { 0x7F, 0x7FF, 0xD7FF, 0xFFFF, 0x10FFFF };
    for (size_t k = 0; k < sizeof ends / sizeof *ends && lo <= hi; k++) {
        if (lo > ends[k])
            continue;
        const uint32_t end = hi < ends[k] ? hi : ends[k];
        if (k == 3 && lo < 0xE000)
            lo = 0xE000;
        if (lo <= end) {
            char a[4], b[4];
            const size_t n = de_utf8_put(a, lo);
            (void)de_utf8_put(b, end);
            utf8_range(f, from, (const uint8_t *)a, (const uint8_t *)b, (int)n, 0, to);
        }
        lo = end + 1;
    }
}

void de_nfa_chars(de_nfa *f, uint32_t from, const de_range *r, uint32_t n, uint32_t to)
{
    for (uint32_t i = 0; i < n; i++)
        char_range(f, from, r[i].lo, r[i].hi, to);
}

/* The characters of r that are not below 32, nor one of the three (0: not used). */
static void chars_without(de_nfa *f, uint32_t from, de_range r, uint32_t least, const char * not,
                          uint32_t to)
{
    uint32_t lo = r.lo < least ? least : r.lo;
    for (; *not ; not ++) { /* by rising code */
        const uint32_t c = (uint8_t) * not ;
        if (c < lo || c > r.hi)
            continue;
        if (lo < c)
            char_range(f, from, lo, c - 1, to);
        lo = c + 1;
    }
    if (lo <= r.hi)
        char_range(f, from, lo, r.hi, to);
}

/* What a JSON string has to escape, and '<', which no tag of the output may be made of. */
static void json_escapes(de_nfa *f, uint32_t from, de_range r, uint32_t to)
{
    static const char names[] = "b\bt\tn\nf\fr\r\"\"\\\\";
    static const char hex[] = "0123456789abcdef";
    for (uint32_t c = r.lo; c <= r.hi && c <= '\\'; c++) {
        if (c >= 32 && c != '"' && c != '\\' && c != '<')
            continue;
        char text[8] = "\\";
        const char *known = NULL;
        for (size_t i = 0; i + 1 < sizeof names - 1; i += 2)
            if ((uint8_t)names[i + 1] == c)
                known = names + i;
        if (known) {
            text[1] = *known;
        } else {
            memcpy(text + 1, "u00", 3);
            text[4] = hex[c >> 4];
            text[5] = hex[c & 15];
        }
        de_nfa_text(f, from, text, to);
    }
}

static void spelled(de_nfa *f, uint32_t from, const de_expr *e, enum de_spelling spelling,
                    uint32_t to)
{
    for (uint32_t i = 0; i < e->n_ranges; i++) {
        switch (spelling) {
        case DE_SPELL_PLAIN:
            char_range(f, from, e->ranges[i].lo, e->ranges[i].hi, to);
            break;
        case DE_SPELL_JSON:
            chars_without(f, from, e->ranges[i], 32, "\"<\\", to);
            json_escapes(f, from, e->ranges[i], to);
            break;
        case DE_SPELL_KEY:
            chars_without(f, from, e->ranges[i], 32, "\"<\\", to);
            break;
        case DE_SPELL_VALUE:
            chars_without(f, from, e->ranges[i], 1, "<", to);
            break;
        }
    }
}

/* ---- expressions */

void de_nfa_expr(de_nfa *f, uint32_t from, const de_expr *e, enum de_spelling spelling, uint32_t to)
{
    if (!de_auto_ok(f->a))
        return;
    if (!e) {
        f->a->code = DELTA_ENOMEM;
        return;
    }
    switch (e->kind) {
    case DE_EXPR_NEVER:
        break;
    case DE_EXPR_BYTES:
        bytes(f, from, e->bytes.p, e->bytes.len, to);
        break;
    case DE_EXPR_CHARS:
        spelled(f, from, e, spelling, to);
        break;
    case DE_EXPR_SEQ:
        for (const de_expr *c = e->child; c; c = c->next) {
            const uint32_t next = c->next ? de_nfa_state(f, 0) : to;
            de_nfa_expr(f, from, c, spelling, next);
            from = next;
        }
        if (!e->child)
            de_nfa_epsilon(f, from, to);
        break;
    case DE_EXPR_ALT:
        for (const de_expr *c = e->child; c; c = c->next)
            de_nfa_expr(f, from, c, spelling, to);
        break;
    case DE_EXPR_REPEAT:
        for (uint32_t i = 0; i < e->min && !f->a->code; i++) {
            const uint32_t next = de_nfa_state(f, 0);
            de_nfa_expr(f, from, e->child, spelling, next);
            from = next;
        }
        if (e->max == DE_MANY) {
            const uint32_t loop = de_nfa_state(f, 0);
            de_nfa_epsilon(f, from, loop);
            const uint32_t back = de_nfa_state(f, 0);
            de_nfa_expr(f, loop, e->child, spelling, back);
            de_nfa_epsilon(f, back, loop);
            from = loop;
        } else {
            for (uint32_t i = e->min; i < e->max && !f->a->code; i++) {
                const uint32_t next = de_nfa_state(f, 0);
                de_nfa_epsilon(f, from, to);
                de_nfa_expr(f, from, e->child, spelling, next);
                from = next;
            }
        }
        de_nfa_epsilon(f, from, to);
        break;
    case DE_EXPR_CALL:
        de_nfa_call(f, from, e->rule, to);
        break;
    }
}

void de_nfa_done(de_nfa *f)
{
    free(f->first);
    free(f->marks);
    free(f->edges);
}

/* ---- subsets */

typedef struct subset {
    uint32_t at, n; /* in pool */
    uint64_t hash;
    uint16_t marks;
} subset;

typedef struct subsets {
    de_nfa *f;
    uint32_t base; /* node of the first subset */
    uint32_t *pool;
    uint32_t n_pool, cap_pool;
    subset *sets;
    uint32_t n_sets, cap_sets;
    uint32_t *table; /* 1 + index */
    uint32_t n_table;
    uint32_t *seen; /* of each state: the last closure that it was in */
    uint32_t closure;
    uint32_t *work; /* a closure in the making */
    uint32_t n_work;
} subsets;

static void work_add(subsets *s, uint32_t state)
{
    if (s->seen[state] == s->closure)
        return;
    s->seen[state] = s->closure;
    s->work[s->n_work++] = state;
}

static void work_begin(subsets *s)
{
    s->closure++;
    s->n_work = 0;
}

static int by_number(const void *x, const void *y)
{
    const uint32_t a = *(const uint32_t *)x, b = *(const uint32_t *)y;
    return a < b ? -1 : a > b;
}

static bool rehash(subsets *s)
{
    const uint32_t n = s->n_table ? 2 * s->n_table : 64;
    uint32_t *table = calloc(n, sizeof *table);
    if (!table)
        return false;
    for (uint32_t i = 0; i < s->n_sets; i++) {
        uint32_t k = (uint32_t)s->sets[i].hash & (n - 1);
        while (table[k])
            k = (k + 1) & (n - 1);
        table[k] = i + 1;
    }
    free(s->table);
    s->table = table;
    s->n_table = n;
    return true;
}

/* The node of the subset in work, with what epsilon edges lead to; UINT32_MAX: a dead one. */
static uint32_t work_end(subsets *s)
{
    de_auto *a = s->f->a;
    uint16_t marks = 0;
    for (uint32_t i = 0; i < s->n_work; i++) {
        marks |= s->f->marks[s->work[i]];
        for (uint32_t e = s->f->first[s->work[i]]; e != UINT32_MAX; e = s->f->edges[e].next)
            if (s->f->edges[e].kind == EPSILON)
                work_add(s, s->f->edges[e].to);
    }
    if (marks & DE_NFA_DIE || s->n_work == 0)
        return UINT32_MAX;
    qsort(s->work, s->n_work, sizeof *s->work, by_number);
    uint64_t hash = UINT64_C(0xCBF29CE484222325);
    for (uint32_t i = 0; i < s->n_work; i++)
        hash = (hash ^ s->work[i]) * UINT64_C(0x9E3779B97F4A7C15);
    hash ^= hash >> 29;
    if (2 * s->n_sets >= s->n_table && !rehash(s)) {
        a->code = DELTA_ENOMEM;
        return UINT32_MAX;
    }
    uint32_t k = (uint32_t)hash & (s->n_table - 1);
    for (; s->table[k]; k = (k + 1) & (s->n_table - 1)) {
        const subset *t = &s->sets[s->table[k] - 1];
        if (t->hash == hash && t->n == s->n_work &&
            memcmp(s->pool + t->at, s->work, t->n * sizeof *s->work) == 0)
            return s->base + s->table[k] - 1;
    }
    while (s->n_pool + s->n_work > s->cap_pool) {
        const uint32_t cap = s->cap_pool ? 2 * s->cap_pool : 1024;
        uint32_t *pool = cap < 64u << 20 ? realloc(s->pool, cap * sizeof *pool) : NULL;
        if (!pool) {
            a->code = cap < 64u << 20 ? DELTA_ENOMEM : DELTA_ELIMIT;
            return UINT32_MAX;
        }
        s->pool = pool;
        s->cap_pool = cap;
    }
    memcpy(s->pool + s->n_pool, s->work, s->n_work * sizeof *s->work);
    subset *sets = de_auto_grow(a, s->sets, s->n_sets, &s->cap_sets, sizeof *sets);
    if (sets)
        s->sets = sets;
    if (a->code) /* it did not grow */
        return UINT32_MAX;
    sets[s->n_sets] = (subset){ s->n_pool, s->n_work, hash, marks };
    s->n_pool += s->n_work;
    s->table[k] = ++s->n_sets;
    return DE_APPEND(a, nodes, (de_node){ .kind = DE_NODE_PLAIN });
}

static void byte_edges(subsets *s, uint32_t set)
{
    const de_nfa *f = s->f;
    de_auto *a = f->a;
    bool border[257] = { true };
    const uint32_t at = s->sets[set].at, n = s->sets[set].n;
    bool any = false;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t e = f->first[s->pool[at + i]]; e != UINT32_MAX; e = f->edges[e].next)
            if (f->edges[e].kind == BYTE)
                any = border[f->edges[e].lo] = border[f->edges[e].hi + 1] = true;
    const uint32_t first = a->n_edges;
    for (unsigned lo = 0, hi; any && lo < 256; lo = hi) {
        for (hi = lo + 1; hi < 256 && !border[hi]; hi++)
            ;
        work_begin(s);
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t e = f->first[s->pool[at + i]]; e != UINT32_MAX; e = f->edges[e].next)
                if (f->edges[e].kind == BYTE && f->edges[e].lo <= lo && f->edges[e].hi >= hi - 1)
                    work_add(s, f->edges[e].to);
        const uint32_t to = work_end(s);
        if (a->code)
            return;
        if (to == UINT32_MAX)
            continue;
        de_edge *last = a->n_edges > first ? &a->edges[a->n_edges - 1] : NULL;
        if (last && last->to == to && last->hi + 1u == lo)
            last->hi = (uint8_t)(hi - 1);
        else
            (void)DE_APPEND(a, edges, (de_edge){ (uint8_t)lo, (uint8_t)(hi - 1), to });
    }
    if (a->code)
        return;
    a->nodes[s->base + set].edges = first;
    a->nodes[s->base + set].n_edges = (uint16_t)(a->n_edges - first);
}

static void call_edges(subsets *s, uint32_t set)
{
    const de_nfa *f = s->f;
    de_auto *a = f->a;
    const uint32_t first = a->n_calls, at = s->sets[set].at, n = s->sets[set].n;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t e = f->first[s->pool[at + i]]; e != UINT32_MAX; e = f->edges[e].next) {
            if (f->edges[e].kind != CALL)
                continue;
            const uint32_t rule = f->edges[e].rule;
            bool done = false;
            for (uint32_t k = first; k < a->n_calls && !done; k++)
                done = a->calls[k].rule == rule;
            if (done)
                continue;
            work_begin(s);
            for (uint32_t j = 0; j < n; j++)
                for (uint32_t d = f->first[s->pool[at + j]]; d != UINT32_MAX; d = f->edges[d].next)
                    if (f->edges[d].kind == CALL && f->edges[d].rule == rule)
                        work_add(s, f->edges[d].to);
            const uint32_t ret = work_end(s);
            if (!a->code && ret != UINT32_MAX)
                (void)DE_APPEND(a, calls, (de_call){ rule, ret });
            if (a->code)
                return;
        }
    a->nodes[s->base + set].calls = first;
    a->nodes[s->base + set].n_calls = a->n_calls - first;
}

uint32_t de_nfa_subsets(de_nfa *f, uint32_t start, uint32_t accept, uint16_t **ret_marks)
{
    de_auto *a = f->a;
    if (a->code)
        return 0;
    subsets s = { .f = f,
                  .base = a->n_nodes,
                  .seen = calloc(f->n_states, sizeof(uint32_t)),
                  .work = malloc(f->n_states * sizeof(uint32_t)) };
    uint16_t *marks = NULL;
    if (!s.seen || !s.work) {
        a->code = DELTA_ENOMEM;
        goto done;
    }
    work_begin(&s);
    work_add(&s, start);
    (void)work_end(&s);
    for (uint32_t i = 0; i < s.n_sets && de_auto_ok(a); i++) {
        byte_edges(&s, i);
        if (!a->code)
            call_edges(&s, i);
    }
    for (uint32_t i = 0; i < s.n_sets && !a->code; i++)
        for (uint32_t k = 0; k < s.sets[i].n; k++)
            if (s.pool[s.sets[i].at + k] == accept)
                a->nodes[s.base + i].flags |= DE_NODE_ACCEPT;
    if (ret_marks && !a->code) {
        marks = malloc(s.n_sets * sizeof *marks);
        if (!marks)
            a->code = DELTA_ENOMEM;
        for (uint32_t i = 0; marks && i < s.n_sets; i++)
            marks[i] = s.sets[i].marks;
    }
    if (ret_marks && !a->code)
        *ret_marks = marks;
done:
    free(s.pool);
    free(s.sets);
    free(s.table);
    free(s.seen);
    free(s.work);
    return s.base;
}
