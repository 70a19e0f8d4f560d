/* text.c -- see text.h. */
#include "grammar/text.h"

#include <stdlib.h>
#include <string.h>

#include "grammar/auto.h"

/* What the parser takes for white space: Python's str.isspace(). */
static const de_range spaces[] = { { 0x09, 0x0D },     { 0x1C, 0x20 },     { 0x85, 0x85 },
                                   { 0xA0, 0xA0 },     { 0x1680, 0x1680 }, { 0x2000, 0x200A },
                                   { 0x2028, 0x2029 }, { 0x202F, 0x202F }, { 0x205F, 0x205F },
                                   { 0x3000, 0x3000 } };
static const char param_close[] = "</parameter>", call_open[] = "<tool_call>",
                  function_open[] = "<function=";

typedef struct maker {
    de_nfa f;
    uint32_t die;
} maker;

static uint32_t then_text(maker *m, uint32_t from, const char *text, unsigned marks)
{
    const uint32_t to = de_nfa_state(&m->f, marks);
    de_nfa_text(&m->f, from, text, to);
    return to;
}

static uint32_t then_space(maker *m, uint32_t from)
{
    const uint32_t loop = de_nfa_state(&m->f, 0);
    de_nfa_epsilon(&m->f, from, loop);
    de_nfa_chars(&m->f, loop, spaces, sizeof spaces / sizeof *spaces, loop);
    return loop;
}

static void dies(maker *m, uint32_t from, const char *text)
{
    de_nfa_text(&m->f, from, text, m->die);
}

/* "<tool_call>", white space, "<function=" */
static void dies_at_call(maker *m, uint32_t from)
{
    dies(m, then_space(m, then_text(m, from, call_open, 0)), function_open);
}

/* "</parameter>" byte by byte: how much of it is there is marked. */
static uint32_t closer(maker *m, uint32_t from, unsigned line)
{
    for (unsigned i = 0; param_close[i]; i++) {
        const unsigned whole = param_close[i + 1] == 0 ? DE_TEXT_CLOSER : 0;
        const uint32_t to = de_nfa_state(&m->f, (i + 1) << DE_TEXT_PENDING | line | whole);
        de_nfa_byte(&m->f, from, (uint8_t)param_close[i], (uint8_t)param_close[i], to);
        from = to;
    }
    return from;
}

/* All characters but NUL: any -> in a line, a newline -> at a line's start, which is in one too. */
static void lines(maker *m, uint32_t in, uint32_t at_start)
{
    static const de_range others[] = { { 0x01, 0x09 }, { 0x0B, 0x10FFFF } };
    de_nfa_chars(&m->f, in, others, 2, in);
    de_nfa_byte(&m->f, in, '\n', '\n', at_start);
    de_nfa_epsilon(&m->f, at_start, in);
}

static void patterns(maker *m, uint32_t in, uint32_t at_start)
{
    /* As the template ends a value: what is a closing tag of the call if it does not go on. */
    (void)then_text(m, closer(m, at_start, DE_TEXT_LINE), "\n</", DE_TEXT_FUNCTION);
    uint32_t s = then_space(m, closer(m, in, 0));
    dies(m, s, "</tool_call>");
    dies(m, s, param_close);
    dies(m, s, function_open);
    dies(m, s, "<parameter=");
    dies_at_call(m, s);
    (void)then_text(m, s, "</function>", DE_TEXT_FUNCTION);

    s = then_space(m, then_text(m, in, "</function>", 0));
    dies(m, s, "</tool_call>");
    dies(m, s, function_open);
    dies_at_call(m, s);

    s = then_space(m, then_text(m, in, "</tool_call>", 0));
    dies_at_call(m, s);

    (void)then_text(m, at_start, "<parameter=", DE_TEXT_PARAM);
    (void)then_text(m, at_start, "<tool_call>\n<function=", DE_TEXT_NEST);
}

static uint16_t walk(const de_text_auto *t, uint16_t state, const char *text)
{
    for (; *text && state != UINT16_MAX; text++)
        state = t->next[state][(uint8_t)*text];
    return state;
}

/* From this state on the text automaton is like from the base or a line's start. */
static bool is_neutral(const de_text_auto *t, uint16_t state)
{
    const uint16_t in = walk(t, t->start, "x"), line = walk(t, in, "\n");
    const uint16_t nest = walk(t, t->nested, "x"), nest_line = walk(t, nest, "\n");
    return state == in || state == line || state == nest || state == nest_line;
}

/* Neutral states, and what the first bytes of a character lead to from there. */
static void mark_sliced(de_text_auto *t)
{
    for (uint32_t i = 0; i < t->n; i++)
        if (is_neutral(t, (uint16_t)i))
            t->marks[i] |= DE_TEXT_NEUTRAL | DE_TEXT_SLICED;
    for (int bytes = 1; bytes < 4; bytes++)
        for (uint32_t i = 0; i < t->n; i++)
            for (unsigned b = 0x80; b < 256 && t->marks[i] & DE_TEXT_SLICED; b++)
                if (t->next[i][b] != UINT16_MAX)
                    t->marks[t->next[i][b]] |= DE_TEXT_SLICED;
}

static int make_table(de_text_auto *t, const de_auto *a, uint16_t *marks, uint32_t n)
{
    t->n = n;
    t->marks = marks;
    t->next = malloc(n * sizeof *t->next);
    if (!t->next)
        return DELTA_ENOMEM;
    memset(t->next, 0xFF, n * sizeof *t->next);
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < a->nodes[i].n_edges; k++) {
            const de_edge *e = &a->edges[a->nodes[i].edges + k];
            for (unsigned b = e->lo; b <= e->hi; b++)
                t->next[i][b] = (uint16_t)e->to;
        }
    return 0;
}

int de_text_auto_make(de_text_auto *t, delta_error *err)
{
    *t = (de_text_auto){ 0 };
    de_auto a;
    de_auto_init(&a, NULL, 0);
    maker m = { .f = { .a = &a } };
    /* A first byte leads to the three starts: 1, 2, 3 cannot occur otherwise, being taken away. */
    const uint32_t root = de_nfa_state(&m.f, 0);
    const uint32_t in = de_nfa_state(&m.f, 0), at_start = de_nfa_state(&m.f, DE_TEXT_LINE);
    const uint32_t nest_in = de_nfa_state(&m.f, 0), nest_start = de_nfa_state(&m.f, 0);
    m.die = de_nfa_state(&m.f, DE_NFA_DIE);
    de_nfa_byte(&m.f, root, 1, 1, at_start);
    de_nfa_byte(&m.f, root, 2, 2, in);
    de_nfa_byte(&m.f, root, 3, 3, nest_in);
    lines(&m, in, at_start);
    patterns(&m, in, at_start);
    lines(&m, nest_in, nest_start);
    (void)then_text(&m, nest_in, "</tool_call>", DE_TEXT_UNNEST);
    (void)then_text(&m, nest_start, "<tool_call>\n<function=", DE_TEXT_NEST);
    uint16_t *marks = NULL;
    const uint32_t first = de_nfa_subsets(&m.f, root, UINT32_MAX, &marks);
    int e = a.code;
    if (!e && a.n_nodes >= UINT16_MAX)
        e = DELTA_EINTERNAL;
    if (e)
        free(marks);
    else
        e = make_table(t, &a, marks, a.n_nodes);
    if (!e) {
        t->start = t->next[first][1];
        t->base = t->next[first][2];
        t->nested = t->next[first][3];
        mark_sliced(t);
    }
    de_nfa_done(&m.f);
    de_auto_done(&a);
    return e ? delta_fail(err, e, "the automaton of free text") : 0;
}

void de_text_auto_done(de_text_auto *t)
{
    free(t->next);
    free(t->marks);
}

/* ---- names */

de_names *de_names_make(de_arena *arena, const delta_str *names, uint32_t n)
{
    size_t most = 1;
    for (uint32_t i = 0; i < n; i++)
        most += names[i].len;
    de_names *t = de_arena_alloc(arena, sizeof *t);
    de_name_node *nodes = de_arena_array(arena, most, sizeof *nodes);
    if (!t || !nodes || most > UINT32_MAX / 2)
        return NULL;
    nodes[0] = (de_name_node){ .index = UINT32_MAX };
    *t = (de_names){ nodes, 1 };
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = 0;
        for (size_t k = 0; k < names[i].len; k++) {
            const uint8_t b = (uint8_t)names[i].p[k];
            uint32_t next = de_names_step(t, at, b);
            if (!next) {
                next = t->n++;
                nodes[next] =
                    (de_name_node){ .next = nodes[at].child, .index = UINT32_MAX, .byte = b };
                nodes[at].child = next;
            }
            at = next;
        }
        if (at)
            nodes[at].index = i;
    }
    return t;
}

uint32_t de_names_step(const de_names *t, uint32_t node, uint8_t byte)
{
    uint32_t c = t->nodes[node].child;
    while (c && t->nodes[c].byte != byte)
        c = t->nodes[c].next;
    return c;
}
