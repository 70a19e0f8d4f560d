/* match.c -- see match.h: places, bytes, tokens, and steps back. */
#include "grammar/match.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* ---- cells */

static uint32_t cell_slot(uint32_t parent, uint32_t a, uint32_t b)
{
    uint64_t h = ((uint64_t)parent << 32 | a) * UINT64_C(0x9E3779B97F4A7C15);
    h = (h ^ h >> 32 ^ b) * UINT64_C(0xC2B2AE3D27D4EB4F);
    return (uint32_t)(h >> 40) & (DELTA_MATCHER_CELLS - 1);
}

uint32_t de_cell_get(delta_matcher *m, uint32_t parent, uint32_t a, uint32_t b)
{
    const uint32_t slot = cell_slot(parent, a, b);
    for (uint32_t c = m->table[slot]; c; c = m->cells[c].chain)
        if (m->cells[c].parent == parent && m->cells[c].a == a && m->cells[c].b == b)
            return c;
    if (m->n_cells == DELTA_MATCHER_CELLS)
        return 0;
    const uint32_t c = m->n_cells++;
    m->cells[c] =
        (de_cell){ parent, a, b, m->table[slot], parent ? m->cells[parent].depth + 1 : 1 };
    m->table[slot] = c;
    return c;
}

/* The newest cell of a chain is its first: cells go in the reverse order of their making. */
void de_cells_drop(delta_matcher *m, uint32_t n)
{
    while (m->n_cells > n) {
        const de_cell *c = &m->cells[--m->n_cells];
        m->table[cell_slot(c->parent, c->a, c->b)] = c->chain;
    }
}

static bool has_list(const delta_matcher *m, uint32_t node)
{
    const uint8_t kind = m->g->a.nodes[node].kind;
    return kind == DE_NODE_PARAMS || kind == DE_NODE_MEMBER || kind == DE_NODE_KEY;
}

/* Keeps what the states of the ring refer to, and numbers it anew; parents stay before children. */
static void cells_collect(delta_matcher *m)
{
    uint32_t *now = m->renumber; /* marks, then new numbers */
    memset(now, 0, m->n_cells * sizeof *now);
    for (uint32_t k = 0; k <= m->past; k++) {
        const uint32_t at = (m->at + DE_RING - k) % DE_RING;
        const de_place *p = m->places + (size_t)at * DELTA_MATCHER_PLACES;
        for (uint32_t i = 0; i < m->ring[at].n; i++) {
            now[p[i].stack] = 1;
            if (has_list(m, p[i].node))
                now[p[i].data] = 1;
            if (m->g->a.nodes[p[i].node].kind == DE_NODE_KEY)
                now[p[i].more] = 1;
        }
    }
    for (uint32_t c = m->n_cells; c-- > 1;) {
        if (!now[c])
            continue;
        const de_cell *cell = &m->cells[c];
        now[cell->parent] = 1;
        if (cell->b == DE_CELL_KEY)
            now[cell->a] = 1;
        else if (cell->b <= DE_REGISTER_MAX && has_list(m, cell->a))
            now[cell->b] = 1;
    }
    const uint32_t n = m->n_cells;
    memset(m->table, 0, DELTA_MATCHER_CELLS * sizeof *m->table);
    m->n_cells = 1;
    now[0] = 0;
    for (uint32_t c = 1; c < n; c++) {
        if (!now[c])
            continue;
        de_cell cell = m->cells[c];
        if (cell.b == DE_CELL_KEY)
            cell.a = now[cell.a];
        else if (cell.b <= DE_REGISTER_MAX && has_list(m, cell.a))
            cell.b = now[cell.b];
        now[c] = de_cell_get(m, now[cell.parent], cell.a, cell.b);
    }
    for (uint32_t k = 0; k <= m->past; k++) {
        const uint32_t at = (m->at + DE_RING - k) % DE_RING;
        de_place *p = m->places + (size_t)at * DELTA_MATCHER_PLACES;
        for (uint32_t i = 0; i < m->ring[at].n; i++) {
            p[i].stack = now[p[i].stack];
            if (has_list(m, p[i].node))
                p[i].data = now[p[i].data];
            if (m->g->a.nodes[p[i].node].kind == DE_NODE_KEY)
                p[i].more = now[p[i].more];
        }
    }
    m->live_cells = m->n_cells;
}

/* ---- lists */

static bool list_has(const delta_matcher *m, uint32_t list, uint32_t a)
{
    for (; list; list = m->cells[list].parent)
        if (m->cells[list].a == a)
            return true;
    return false;
}

/* The list of used parameters and one more, by number: however they came, the same list. */
static uint32_t used_with(delta_matcher *m, uint32_t list, uint32_t param)
{
    uint32_t above[DELTA_GRAMMAR_PARAMS], n = 0;
    while (list && m->cells[list].a > param) {
        above[n++] = m->cells[list].a;
        list = m->cells[list].parent;
    }
    list = de_cell_get(m, list, param, DE_CELL_USED);
    while (n && list)
        list = de_cell_get(m, list, above[--n], DE_CELL_USED);
    return list;
}

/* All required parameters are in the list. */
static bool has_required(const delta_matcher *m, const de_call_tool *t, uint32_t used)
{
    for (uint32_t i = 0; i < t->n_params; i++)
        if (t->params[i].required && !list_has(m, used, i))
            return false;
    return true;
}

/* The call that a value belongs to. */
static const de_call_tool *tool_of(delta_matcher *m, uint32_t stack, uint32_t *ret_used)
{
    for (; stack; stack = m->cells[stack].parent) {
        const de_cell *c = &m->cells[stack];
        if (c->depth < m->lowest)
            m->lowest = c->depth;
        if (m->g->a.nodes[c->a].kind == DE_NODE_PARAMS) {
            *ret_used = c->b;
            return &m->g->a.tools[m->g->a.nodes[c->a].arg];
        }
    }
    return NULL;
}

static uint32_t key_bytes(const delta_matcher *m, uint32_t key, char *out)
{
    const uint32_t n = key ? m->cells[key].depth : 0;
    for (uint32_t i = n; i-- > 0; key = m->cells[key].parent)
        out[i] = (char)m->cells[key].a;
    return n;
}

/* May this key stand in an object that has those? */
static bool key_is_new(delta_matcher *m, const de_object *o, uint32_t list, uint32_t key)
{
    if (list || o->n_names)
        m->keys = true;
    char text[DE_KEY_BYTES];
    const uint32_t n = key_bytes(m, key, text);
    for (uint32_t i = 0; i < o->n_names; i++)
        if (o->names[i].len == n && memcmp(o->names[i].p, text, n) == 0)
            return false;
    return !list_has(m, list, key);
}

/* ---- sets of places */

static void add(de_set *s, de_place p)
{
    for (uint32_t i = 0; i < s->n; i++)
        if (s->p[i].node == p.node && s->p[i].stack == p.stack && s->p[i].data == p.data &&
            s->p[i].more == p.more)
            return;
    if (s->n < DELTA_MATCHER_PLACES)
        s->p[s->n++] = p;
}

/* Calls a rule; what comes behind it is ret. A call that nothing comes behind leaves no trace. */
static void call(delta_matcher *m, de_set *s, uint32_t rule, uint32_t ret, uint32_t data,
                 uint32_t stack)
{
    const de_auto *a = &m->g->a;
    const de_node *r = &a->nodes[ret];
    const uint32_t node = a->rules[rule];
    const unsigned flags = a->nodes[node].flags;
    if (flags & DE_NODE_DEAD ||
        (flags & DE_NODE_RECURSIVE && stack && m->cells[stack].depth > DE_RECURSION_FRAMES))
        return;
    const bool last = r->kind == DE_NODE_PLAIN && r->n_edges == 0 && r->n_calls == 0;
    if (!last) {
        stack = de_cell_get(m, stack, ret, data);
        if (!stack)
            return;
    }
    add(s, (de_place){ .node = node, .stack = stack });
}

static void leave(delta_matcher *m, de_set *s, uint32_t stack)
{
    if (!stack) {
        m->accepting = true;
        m->lowest = 0;
        return;
    }
    const de_cell c = m->cells[stack];
    if (c.depth < m->lowest)
        m->lowest = c.depth;
    add(s, (de_place){ .node = c.a, .stack = c.parent, .data = c.b });
}

static uint32_t at_most(uint32_t n, uint32_t max)
{
    return n < max ? n : max;
}

static void spread_count(delta_matcher *m, de_set *s, const de_place p, const de_count *c)
{
    const uint32_t n = p.data;
    if (n >= c->min)
        leave(m, s, p.stack);
    if (n < c->max) {
        const uint32_t least = c->min ? c->min : 1;
        const uint32_t next = c->max == DE_MANY ? at_most(n + 1, least) : n + 1;
        call(m, s, n ? c->next : c->first, p.node, next, p.stack);
    }
}

static void spread_params(delta_matcher *m, de_set *s, const de_place p, const de_call_tool *t)
{
    if (has_required(m, t, p.data))
        leave(m, s, p.stack);
    for (uint32_t i = 0; i < t->n_params; i++) {
        if (list_has(m, p.data, i))
            continue;
        const uint32_t used = used_with(m, p.data, i);
        if (used)
            call(m, s, t->params[i].rule, p.node, used, p.stack);
    }
}

/* How many members an object has so far. */
static uint32_t members(delta_matcher *m, const de_object *o, uint32_t list)
{
    m->keys |= o->min > 0 || o->max != DE_MANY;
    return list ? m->cells[list].depth : 0;
}

static void spread_member(delta_matcher *m, de_set *s, const de_place p, const de_object *o)
{
    const uint32_t n = members(m, o, p.data);
    if (n >= o->min)
        leave(m, s, p.stack);
}

/* The set with all that its places lead to without reading; only places that read stay. */
static uint32_t spread(delta_matcher *m, de_set *s)
{
    const de_auto *a = &m->g->a;
    for (uint32_t i = 0; i < s->n; i++) {
        const de_place p = s->p[i];
        const de_node *n = &a->nodes[p.node];
        switch ((enum de_node_kind)n->kind) {
        case DE_NODE_COUNT:
            spread_count(m, s, p, &a->counts[n->arg]);
            break;
        case DE_NODE_PARAMS:
            spread_params(m, s, p, &a->tools[n->arg]);
            break;
        case DE_NODE_MEMBER:
            if (n->flags & DE_NODE_ACCEPT)
                spread_member(m, s, p, &a->objects[n->arg]);
            break;
        case DE_NODE_PLAIN:
        case DE_NODE_STRING:
            if (n->flags & DE_NODE_ACCEPT)
                leave(m, s, p.stack);
            break;
        case DE_NODE_TEXT:
        case DE_NODE_KEY:
            break;
        }
        for (uint32_t k = 0; k < n->n_calls; k++)
            call(m, s, a->calls[n->calls + k].rule, a->calls[n->calls + k].ret, p.data, p.stack);
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i < s->n; i++) {
        const de_node *n = &a->nodes[s->p[i].node];
        if (n->n_edges || n->kind == DE_NODE_TEXT || n->kind == DE_NODE_KEY)
            s->p[kept++] = s->p[i];
    }
    return s->n = kept;
}

uint32_t de_spread_exits(delta_matcher *m, de_place *p)
{
    de_set s = { p, 1 };
    const de_place from = p[0];
    m->accepting = false;
    const uint32_t n = spread(m, &s);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < n; i++)
        if (p[i].node != from.node || p[i].stack != from.stack)
            p[kept++] = p[i];
    return kept;
}

uint32_t de_start(delta_matcher *m, uint32_t rule, de_place *out)
{
    de_set s = { out, 0 };
    m->accepting = false;
    const uint32_t node = m->g->a.rules[rule];
    if (!(m->g->a.nodes[node].flags & DE_NODE_DEAD))
        add(&s, (de_place){ .node = node });
    return spread(m, &s);
}

/* ---- a byte */

/* The register of free text: the automaton's state, how many quoted calls are open, and 1 + where
 * in the trie of parameters' names a "<parameter=" at a line's start has got. 0 before the first byte. */
enum { TEXT_STATE_BITS = 11, TEXT_NEST_BITS = 4 };

static uint32_t text_pack(uint32_t state, uint32_t nest, uint32_t name)
{
    return state | nest << TEXT_STATE_BITS | name << (TEXT_STATE_BITS + TEXT_NEST_BITS);
}

static uint32_t text_state(const delta_matcher *m, const de_place *p)
{
    return p->data ? p->data & ((1u << TEXT_STATE_BITS) - 1) : m->g->vocab->text_auto.start;
}

bool de_text_sliced(const delta_matcher *m, const de_place *p)
{
    const de_text_info *info = &m->g->a.texts[m->g->a.nodes[p->node].arg];
    return m->g->vocab->text_auto.marks[text_state(m, p)] & DE_TEXT_SLICED &&
           !(p->data >> (TEXT_STATE_BITS + TEXT_NEST_BITS)) && (!info->no_nested || p->more);
}

bool de_text_between(const delta_matcher *m, const de_place *p)
{
    return m->g->vocab->text_auto.next[text_state(m, p)]['a'] != UINT16_MAX;
}

static bool ends_unclosed(delta_matcher *m, uint32_t stack, uint32_t name)
{
    uint32_t used = 0;
    const de_call_tool *t = tool_of(m, stack, &used);
    const uint32_t param = t ? t->names->nodes[name].index : UINT32_MAX;
    return param != UINT32_MAX && !list_has(m, used, param);
}

static void step_text(delta_matcher *m, de_set *s, const de_place p, const de_text_info *info,
                      uint8_t b)
{
    const de_text_auto *t = &m->g->vocab->text_auto;
    uint32_t nest = p.data >> TEXT_STATE_BITS & ((1u << TEXT_NEST_BITS) - 1);
    uint32_t name = p.data >> (TEXT_STATE_BITS + TEXT_NEST_BITS);
    uint32_t to = t->next[text_state(m, &p)][b];
    if (to == UINT16_MAX)
        return;
    if (name) {
        uint32_t used;
        const de_call_tool *tool = tool_of(m, p.stack, &used);
        if (b == '>' && ends_unclosed(m, p.stack, name - 1))
            return;
        const uint32_t next = tool ? de_names_step(tool->names, name - 1, b) : 0;
        name = next ? next + 1 : 0;
    }
    const unsigned marks = t->marks[to];
    if (marks & DE_TEXT_PARAM)
        name = 1;
    if (marks & DE_TEXT_FUNCTION) {
        uint32_t used = 0;
        const de_call_tool *tool = tool_of(m, p.stack, &used);
        if (tool && !has_required(m, tool, used))
            return;
    }
    const bool counted = info->min > 0 || info->max != DE_MANY;
    if (marks & DE_TEXT_NEST) { /* where every character counts, no tags are quoted */
        if (nest == DE_TEXT_NEST_MAX || counted)
            return;
        nest++;
        to = t->nested;
    } else if (marks & DE_TEXT_UNNEST) {
        to = --nest ? t->nested : t->base;
    }
    uint32_t more = p.more;
    const bool begins = (b & 0xC0) != 0x80;
    if (info->no_nested && !more) {
        if (strchr("{[(\"'", b) || b >= 0x80)
            return;
        more = !((b >= 0x09 && b <= 0x0D) || (b >= 0x1C && b <= 0x20));
    }
    if (counted && begins)
        more = info->max == DE_MANY ? at_most(more + 1, info->min + 13) : more + 1;
    const unsigned line = (marks & DE_TEXT_LINE) != 0;
    const unsigned pending = (marks >> DE_TEXT_PENDING & DE_TEXT_PENDING_MASK) + line;
    /* what the value is if a closer is on its way */
    const uint32_t len = more - pending;
    const bool fits = !counted || (len >= info->min && len <= info->max);
    if (marks & DE_TEXT_CLOSER) {
        if (fits)
            add(s, (de_place){ .node = info->tail, .stack = p.stack });
        if (counted)
            return;
    }
    if (counted && more > info->max && !(pending && fits))
        return;
    add(s, (de_place){ p.node, p.stack, text_pack(to, nest, name), more });
}

static void step_key(delta_matcher *m, de_set *s, const de_place p, const de_node *n, uint8_t b)
{
    const de_auto *a = &m->g->a;
    const de_object *o = &a->objects[n->arg];
    if (b == '"' && n->flags & DE_NODE_ACCEPT) {
        if (!key_is_new(m, o, p.data, p.more))
            return;
        const uint32_t list = de_cell_get(m, p.data, p.more, DE_CELL_KEY);
        if (list)
            call(m, s, o->value, o->next_node, list, p.stack);
        return;
    }
    const de_edge *e = de_node_edge(a, n, b);
    const uint32_t len = p.more ? m->cells[p.more].depth : 0;
    if (!e || len >= (n->flags & DE_NODE_ACCEPT ? DE_KEY_ENOUGH : DE_KEY_BYTES))
        return;
    const uint32_t key = de_cell_get(m, p.more, b, DE_CELL_BYTE);
    const de_node *to = &a->nodes[e->to];
    if (key && (to->n_edges || key_is_new(m, o, p.data, key)))
        add(s, (de_place){ e->to, p.stack, p.data, key });
}

static void step_string(de_set *s, const de_place p, const de_auto *a, const de_node *n, uint8_t b)
{
    const de_edge *e = de_node_edge(a, n, b);
    if (!e)
        return;
    const de_string *str = &a->strings[n->arg];
    uint32_t more = p.more;
    if (str->min > 0 || str->max != DE_MANY) {
        if (b == '"' && a->nodes[e->to].flags & DE_NODE_ACCEPT) {
            if (more < str->min)
                return;
            more = 0;
        } else if (n->flags & DE_NODE_BETWEEN) {
            more = str->max == DE_MANY ? at_most(more + 1, str->min) : more + 1;
            if (more > str->max)
                return;
        }
    }
    add(s, (de_place){ e->to, p.stack, 0, more });
}

static void step_member(delta_matcher *m, de_set *s, const de_place p, const de_node *n, uint8_t b)
{
    const de_auto *a = &m->g->a;
    const de_object *o = &a->objects[n->arg];
    const de_edge *e = members(m, o, p.data) < o->max ? de_node_edge(a, n, b) : NULL;
    if (e)
        add(s, (de_place){ e->to, p.stack, p.data, 0 });
}

uint32_t de_step(delta_matcher *m, const de_place *in, uint32_t n, uint8_t byte, de_place *out)
{
    const de_auto *a = &m->g->a;
    de_set s = { out, 0 };
    bool more = false; /* a node that leads on without reading */
    m->accepting = false;
    for (uint32_t i = 0; i < n; i++) {
        const de_node *node = &a->nodes[in[i].node];
        switch ((enum de_node_kind)node->kind) {
        case DE_NODE_PLAIN: {
            const de_edge *e = de_node_edge(a, node, byte);
            if (e)
                add(&s, (de_place){ .node = e->to, .stack = in[i].stack });
            break;
        }
        case DE_NODE_STRING:
            step_string(&s, in[i], a, node, byte);
            break;
        case DE_NODE_TEXT:
            step_text(m, &s, in[i], &a->texts[node->arg], byte);
            break;
        case DE_NODE_KEY:
            step_key(m, &s, in[i], node, byte);
            break;
        case DE_NODE_MEMBER:
            step_member(m, &s, in[i], node, byte);
            break;
        case DE_NODE_COUNT:
        case DE_NODE_PARAMS:
            break;
        }
    }
    for (uint32_t i = 0; i < s.n && !more; i++) {
        const de_node *node = &a->nodes[s.p[i].node];
        more = node->flags & DE_NODE_ACCEPT || node->n_calls || node->kind == DE_NODE_COUNT ||
               node->kind == DE_NODE_PARAMS;
    }
    return more ? spread(m, &s) : s.n;
}

/* ---- a byte in any phase */

static void enter_rules(delta_matcher *m, de_state *s, de_place *p, uint32_t rule)
{
    s->phase = DE_PHASE_RULES;
    s->think = 0;
    s->n = (uint16_t)de_start(m, rule, p);
    s->accepting = m->accepting;
}

static bool rules_step(delta_matcher *m, de_state *s, de_place *p, de_place *spare, uint8_t byte)
{
    static const char think[] = "</think>";
    if (m->g->watch_think) {
        s->think = byte == (uint8_t)think[s->think] ? (uint8_t)(s->think + 1) : byte == '<';
        if (s->think == sizeof think - 1)
            return false;
    }
    s->n = (uint16_t)de_step(m, p, s->n, byte, spare);
    s->accepting = m->accepting;
    memcpy(p, spare, s->n * sizeof *p);
    return s->n || s->accepting;
}

/* What was said of a call without wrapper is said to its rule again, as the template would. */
static bool enter_bare(delta_matcher *m, de_state *s, de_place *p, de_place *spare, uint32_t rule,
                       const char *text)
{
    enter_rules(m, s, p, rule);
    for (; *text; text++)
        if (!rules_step(m, s, p, spare, (uint8_t)*text))
            return false;
    return true;
}

bool de_state_step(delta_matcher *m, de_state *s, de_place *p, de_place *spare, uint8_t byte)
{
    const delta_grammar *g = m->g;
    if (s->phase == DE_PHASE_RULES)
        return rules_step(m, s, p, spare, byte);
    if (s->phase == DE_PHASE_ENDED)
        return false;
    uint32_t tool = 0;
    const enum de_scan_found found = de_scan_step(&g->scan, &s->scan, byte, &tool);
    if (found == DE_SCAN_NOTHING)
        return true;
    if (found == DE_SCAN_UNKNOWN)
        return false;
    if (found == DE_SCAN_THINK_END) {
        if (g->free_content)
            s->phase = DE_PHASE_CONTENT;
        else
            enter_rules(m, s, p, g->turn);
        return true;
    }
    const de_call_tool *t = &g->a.tools[tool];
    if (!t->allowed)
        return false;
    if (found == DE_SCAN_BARE_PARAM)
        return enter_bare(m, s, p, spare, t->bare, "\n<parameter=");
    if (found == DE_SCAN_BARE_END)
        return enter_bare(m, s, p, spare, t->bare, "\n</function>");
    enter_rules(m, s, p, t->wrapped);
    return s->n > 0;
}

/* May the turn end? In content, not where a call was opened and its tool is not named yet. */
bool de_state_accepting(const delta_matcher *m, const de_state *s)
{
    switch (s->phase) {
    case DE_PHASE_THINK:
        return m->g->free_content;
    case DE_PHASE_CONTENT:
        return !de_scan_in_name(&s->scan);
    case DE_PHASE_RULES:
        return s->accepting;
    default:
        return false;
    }
}

bool de_state_free(const delta_matcher *m, const de_state *s)
{
    return (s->phase == DE_PHASE_THINK || s->phase == DE_PHASE_CONTENT) && m->g->free_content &&
           (!m->g->scan.calls || (de_scan_is_calm(&s->scan) && !m->g->vocab->has_long_tags));
}

/* ---- tokens */

static void tail_add(delta_matcher *m, const uint8_t *p, size_t n)
{
    char *tail = m->tails[m->at];
    const size_t keep = n < DE_TAIL_BYTES ? DE_TAIL_BYTES - n : 0;
    size_t have = m->n_tail[m->at];
    if (have > keep) {
        memmove(tail, tail + have - keep, keep);
        have = keep;
    }
    if (n > DE_TAIL_BYTES) {
        p += n - DE_TAIL_BYTES;
        n = DE_TAIL_BYTES;
    }
    memcpy(tail + have, p, n);
    m->n_tail[m->at] = (uint8_t)(have + n);
}

/* Makes a copy of the current state the current one. */
static void push(delta_matcher *m)
{
    const uint32_t from = m->at, to = (from + 1) % DE_RING;
    m->ring[to] = m->ring[from];
    memcpy(m->places + (size_t)to * DELTA_MATCHER_PLACES,
           m->places + (size_t)from * DELTA_MATCHER_PLACES, m->ring[from].n * sizeof *m->places);
    memcpy(m->tails[to], m->tails[from], m->n_tail[from]);
    m->n_tail[to] = m->n_tail[from];
    m->at = to;
    m->past += m->past < DELTA_MATCHER_ROLLBACK;
}

static void pop(delta_matcher *m)
{
    m->at = (m->at + DE_RING - 1) % DE_RING;
    m->past--;
}

/* The state that the token leads to is in the ring behind the current one; false: not allowed. */
static bool take(delta_matcher *m, uint32_t id)
{
    const delta_grammar_vocab *v = m->g->vocab;
    de_state *s = de_now(m);
    if (de_vocab_is_end(v, id)) {
        if (!de_state_accepting(m, s))
            return false;
        s->phase = DE_PHASE_ENDED;
        s->n = 0;
        return true;
    }
    if (id >= v->n_vocab || !de_bit(v->text, id))
        return id < v->n_vocab && de_state_free(m, s);
    size_t len;
    const uint8_t *bytes = delta_token_bytes(v->tok, id, &len);
    for (size_t i = 0; i < len; i++)
        if (!de_state_step(m, s, de_places(m), m->pool, bytes[i]))
            return false;
    tail_add(m, bytes, len);
    return true;
}

int delta_matcher_accept(delta_matcher *m, const uint32_t *ids, size_t n, size_t *ret_taken,
                         delta_error *err)
{
    assert(m && (ids || n == 0));
    size_t i = 0;
    for (; i < n; i++) {
        if (m->n_cells > DELTA_MATCHER_CELLS / 2 && m->n_cells >= 2 * m->live_cells)
            cells_collect(m);
        const uint32_t past = m->past;
        push(m);
        if (!take(m, ids[i])) {
            pop(m);
            m->past = past;
            break;
        }
    }
    if (ret_taken)
        *ret_taken = i;
    if (i < n)
        return delta_fail(err, DELTA_EINVALID, "grammar: token %u is not allowed here", ids[i]);
    return 0;
}

int delta_matcher_rollback(delta_matcher *m, size_t n, delta_error *err)
{
    assert(m);
    if (n > m->past)
        return delta_fail(err, DELTA_EINVALID, "grammar: %zu tokens back, %u can be", n, m->past);
    for (; n > 0; n--)
        pop(m);
    return 0;
}

bool delta_matcher_is_accepting(const delta_matcher *m)
{
    return de_state_accepting(m, de_now(m));
}

bool delta_matcher_is_ended(const delta_matcher *m)
{
    return de_now(m)->phase == DE_PHASE_ENDED;
}

/* ---- making and freeing */

void delta_matcher_reset(delta_matcher *m)
{
    const delta_grammar *g = m->g;
    de_cells_drop(m, 1);
    m->live_cells = 0;
    m->at = m->past = 0;
    m->n_tail[0] = 0;
    de_state *s = de_now(m);
    *s = (de_state){ 0 };
    de_scan_begin(&s->scan, g->thinking);
    if (g->thinking)
        s->phase = DE_PHASE_THINK;
    else if (g->free_content)
        s->phase = DE_PHASE_CONTENT;
    else
        enter_rules(m, s, de_places(m), g->turn);
}

int delta_matcher_new(delta_grammar *g, delta_matcher **ret_m, delta_error *err)
{
    assert(g && ret_m);
    delta_matcher *m = calloc(1, sizeof *m);
    const size_t states = DE_RING;
    bool ok = m != NULL;
    if (ok) {
        m->g = delta_grammar_ref(g);
        m->cap_pool = (g->vocab->longest + 2) * DELTA_MATCHER_PLACES;
        ok = (m->ring = calloc(states, sizeof *m->ring)) &&
             (m->places = calloc(states * DELTA_MATCHER_PLACES, sizeof *m->places)) &&
             (m->tails = calloc(states, sizeof *m->tails)) && (m->n_tail = calloc(states, 1)) &&
             (m->cells = calloc(DELTA_MATCHER_CELLS, sizeof *m->cells)) &&
             (m->table = calloc(DELTA_MATCHER_CELLS, sizeof *m->table)) &&
             (m->renumber = calloc(DELTA_MATCHER_CELLS, sizeof *m->renumber)) &&
             (m->pool = calloc(m->cap_pool, sizeof *m->pool)) &&
             (m->scratch = calloc(g->vocab->words, sizeof *m->scratch));
    }
    if (!ok) {
        delta_matcher_free(m);
        return delta_fail(err, DELTA_ENOMEM, "grammar matcher");
    }
    m->n_cells = 1;
    delta_matcher_reset(m);
    *ret_m = m;
    return 0;
}

void delta_matcher_free(delta_matcher *m)
{
    if (!m)
        return;
    delta_grammar_free(m->g);
    free(m->ring);
    free(m->places);
    free(m->tails);
    free(m->n_tail);
    free(m->cells);
    free(m->table);
    free(m->renumber);
    free(m->pool);
    free(m->scratch);
    free(m);
}
