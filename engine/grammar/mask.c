/* mask.c -- which tokens may come next; see match.h.
 *
 * The plain way walks the trie of the vocabulary and steps the matcher's places
 * along, giving up a subtree where none is left. That is quick where little is
 * allowed. Where much is, one of three helps:
 *
 *   loose   inside free text or a JSON string: the vocabulary's slice is allowed
 *           wholesale, a walk over what is pending takes tokens away, and a
 *           walk over the slice's small rest adds tokens
 *   wide    states of other rules that let thousands of tokens pass know since
 *           compiling which ones stay in the rule, and where the others leave it
 *   cache   masks that were costly are kept in the grammar, by what of the
 *           places and of the top of their stacks they depend on
 *
 * All give exactly the tokens that delta_matcher_accept() would take. */
#include "grammar/match.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* ---- walks */

enum { MASK_WORTH_KEEPING = 400 }; /* nodes visited: cheaper masks are not cached */

typedef struct level {
    uint32_t begin, n; /* places, in the pool */
    uint32_t cells;
} level;

/* Sets the bits of the tokens below `root` that the n places at the pool's start allow. */
static void walk(delta_matcher *m, const de_trie *t, uint32_t root, uint32_t n, uint32_t *bits)
{
    level at[DELTA_GRAMMAR_TOKEN_BYTES + 1];
    const uint32_t base = t->nodes[root].depth, end = t->nodes[root].skip;
    at[0] = (level){ 0, n, m->n_cells };
    for (uint32_t i = root + 1; i < end;) {
        const de_trie_node *node = &t->nodes[i];
        const uint32_t d = node->depth - base;
        const level *up = &at[d - 1];
        de_cells_drop(m, up->cells);
        m->visited++;
        const uint32_t begin = up->begin + up->n;
        const uint32_t places = de_step(m, m->pool + up->begin, up->n, node->byte, m->pool + begin);
        if (places || m->accepting)
            for (uint32_t k = 0; k < node->n_here; k++)
                de_bit_set(bits, t->order[node->rank + k]);
        if (places) {
            at[d] = (level){ begin, places, m->n_cells };
            i++;
        } else {
            i = node->skip;
        }
    }
    de_cells_drop(m, at[0].cells);
}

static void clear_below(const de_trie *t, uint32_t node, uint32_t *bits)
{
    const uint32_t end = t->nodes[t->nodes[node].skip].rank;
    for (uint32_t r = t->nodes[node].rank; r < end; r++)
        de_bit_clear(bits, t->order[r]);
}

/* ---- loose places */

/* From here on the slice is right. */
static bool is_sliced(const delta_matcher *m, const de_place *p)
{
    const de_node *n = &m->g->a.nodes[p->node];
    return n->kind == DE_NODE_TEXT ? de_text_sliced(m, p) : (n->flags & DE_NODE_NEUTRAL) != 0;
}

/* How many more characters may come. The bound of a key is in bytes: see key_slice(). */
static uint32_t room(const delta_matcher *m, const de_place *p)
{
    const de_auto *a = &m->g->a;
    const de_node *n = &a->nodes[p->node];
    const uint32_t max = n->kind == DE_NODE_TEXT     ? a->texts[n->arg].max
                         : n->kind == DE_NODE_STRING ? a->strings[n->arg].max
                                                     : DE_MANY;
    return max == DE_MANY ? DE_MANY : max - p->more;
}

static uint32_t key_length(const delta_matcher *m, const de_place *p)
{
    return p->more ? m->cells[p->more].depth : 0;
}

static bool is_loose(const delta_matcher *m, const de_place *p)
{
    const de_auto *a = &m->g->a;
    const de_node *n = &a->nodes[p->node];
    switch ((enum de_node_kind)n->kind) {
    case DE_NODE_TEXT:
        return de_text_between(m, p) &&
               (a->texts[n->arg].max == DE_MANY || p->more <= a->texts[n->arg].max);
    case DE_NODE_STRING:
        return n->flags & DE_NODE_BETWEEN;
    case DE_NODE_KEY:
        return n->flags & DE_NODE_BETWEEN && key_length(m, p) < DE_KEY_ENOUGH;
    default:
        return false;
    }
}

/* The slice's tokens of at most `most` characters. With a newline more in a text: see below. */
static void slice_copy(const delta_grammar_vocab *v, const de_slice *s, uint32_t most, bool newline,
                       uint32_t *bits)
{
    if (most >= s->max_chars) {
        memcpy(bits, s->all, v->words * sizeof *bits);
        return;
    }
    const uint32_t kept = most < DE_SLICE_SHORT ? most : DE_SLICE_SHORT;
    if (kept)
        memcpy(bits, s->upto[kept], v->words * sizeof *bits);
    else
        memset(bits, 0, v->words * sizeof *bits);
    if (most > kept)
        for (uint32_t i = s->begin[kept + 1]; i < s->begin[most + 1]; i++)
            de_bit_set(bits, s->ids[i]);
    for (uint32_t i = 0; newline && i < s->n_lines; i++)
        if (s->line_chars[i] == most + 1)
            de_bit_set(bits, s->lines[i]);
}

/* Of a key with so many bytes to go: no character may begin behind them. */
static void key_slice(const delta_grammar_vocab *v, const de_slice *s, uint32_t bytes,
                      uint32_t *bits)
{
    const uint32_t sure = (bytes - 1) / 4 + 1; /* characters that fit, whatever they are */
    slice_copy(v, s, sure, false, bits);
    for (uint32_t i = sure < s->max_chars ? s->begin[sure + 1] : UINT32_MAX;
         i < s->begin[s->max_chars + 1]; i++) {
        if (s->last[i] < bytes)
            de_bit_set(bits, s->ids[i]);
    }
}

/* Something is pending: steps along while it is, and corrects what the slice said. */
static void correct(delta_matcher *m, uint32_t *bits)
{
    const de_trie *t = &m->g->vocab->trie;
    level at[DELTA_GRAMMAR_TOKEN_BYTES + 1];
    at[0] = (level){ 0, 1, m->n_cells };
    for (uint32_t i = 1; i < t->n;) {
        const de_trie_node *node = &t->nodes[i];
        const level *up = &at[node->depth - 1];
        de_cells_drop(m, up->cells);
        m->visited++;
        const uint32_t begin = up->begin + up->n;
        const uint32_t n = de_step(m, m->pool + up->begin, up->n, node->byte, m->pool + begin);
        bool sliced = false;
        for (uint32_t k = 0; k < n; k++)
            sliced |= is_sliced(m, &m->pool[begin + k]);
        if (sliced) {
            i = node->skip;
            continue;
        }
        if (n == 0 && !m->accepting) {
            clear_below(t, i, bits);
            i = node->skip;
            continue;
        }
        for (uint32_t k = 0; k < node->n_here; k++)
            de_bit_set(bits, t->order[node->rank + k]);
        if (n == 0) {
            const uint32_t rank = node->rank + node->n_here, end = t->nodes[node->skip].rank;
            for (uint32_t r = rank; r < end; r++)
                de_bit_clear(bits, t->order[r]);
            i = node->skip;
            continue;
        }
        at[node->depth] = (level){ begin, n, m->n_cells };
        i++;
    }
    de_cells_drop(m, at[0].cells);
}

static void loose(delta_matcher *m, const de_place place, uint32_t *bits)
{
    const delta_grammar_vocab *v = m->g->vocab;
    const bool text = m->g->a.nodes[place.node].kind == DE_NODE_TEXT;
    const de_slice *s = &v->slice[text ? DE_SLICE_TEXT : DE_SLICE_JSON];
    if (m->g->a.nodes[place.node].kind == DE_NODE_KEY)
        key_slice(v, s, DE_KEY_ENOUGH - key_length(m, &place), bits);
    else
        slice_copy(v, s, room(m, &place), text, bits);
    m->visited += MASK_WORTH_KEEPING;
    m->pool[0] = place;
    if (!is_sliced(m, &place))
        correct(m, bits);
    walk(m, &s->rest, 0, 1, bits);
}

/* ---- wide places */

static void wide(delta_matcher *m, const de_place place, uint32_t *bits)
{
    const de_auto *a = &m->g->a;
    const de_wide *w = &a->wides[a->nodes[place.node].wide - 1];
    const de_trie *t = &m->g->vocab->trie;
    for (uint32_t i = 0; i < m->g->vocab->words; i++)
        bits[i] |= w->inside[i];
    m->visited += MASK_WORTH_KEEPING;
    de_place from[DELTA_MATCHER_PLACES]; /* behind the exit's node */
    uint32_t n_from = 0, n = 0;
    bool alive = false; /* with the exit's byte */
    const uint32_t cells = m->n_cells;
    for (uint32_t i = 0; i < w->n_exits; i++) {
        const de_wide_exit *e = &w->exits[i];
        const bool other = i == 0 || e->node != e[-1].node;
        if (other) {
            de_cells_drop(m, cells);
            from[0] = (de_place){ .node = e->node, .stack = place.stack };
            n_from = de_spread_exits(m, from);
        }
        if (other || e->byte != e[-1].byte) {
            n = de_step(m, from, n_from, e->byte, m->pool);
            alive = n || m->accepting;
        }
        if (!alive)
            continue;
        const de_trie_node *child = &t->nodes[e->child];
        for (uint32_t k = 0; k < child->n_here; k++)
            de_bit_set(bits, t->order[child->rank + k]);
        if (n)
            walk(m, t, e->child, n, bits);
    }
    de_cells_drop(m, cells);
}

/* ---- all places of a state */

static void rules_mask(delta_matcher *m, const de_state *s, const de_place *p, uint32_t *bits)
{
    const delta_grammar_vocab *v = m->g->vocab;
    bool begun = false;
    for (uint32_t i = 0; i < s->n; i++) {
        if (!is_loose(m, &p[i]))
            continue;
        loose(m, p[i], begun ? m->scratch : bits);
        for (uint32_t k = 0; begun && k < v->words; k++)
            bits[k] |= m->scratch[k];
        begun = true;
    }
    if (!begun)
        memset(bits, 0, v->words * sizeof *bits);
    for (uint32_t i = 0; i < s->n; i++)
        if (m->g->a.nodes[p[i].node].wide)
            wide(m, p[i], bits);
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->n; i++)
        if (!m->g->a.nodes[p[i].node].wide && !is_loose(m, &p[i]))
            m->pool[n++] = p[i];
    if (n)
        walk(m, &v->trie, 0, n, bits);
}

/* "</think>" would be dropped from content: no token may complete it. */
static void forbid_think(const delta_matcher *m, const de_state *s, uint32_t *bits)
{
    static const char think[] = "</think>";
    const delta_grammar_vocab *v = m->g->vocab;
    for (uint32_t i = 0; i < v->n_think_ids; i++)
        de_bit_clear(bits, v->think_ids[i]);
    if (s->think) {
        const uint32_t node =
            de_trie_find(&v->trie, 0, think + s->think, sizeof think - 1 - s->think);
        if (node != UINT32_MAX)
            clear_below(&v->trie, node, bits);
    }
}

/* ---- the cache */

int de_cache_init(de_cache *c, uint32_t words)
{
    if (pthread_mutex_init(&c->lock, NULL) != 0)
        return DELTA_ENOMEM;
    c->has_lock = true;
    c->slots = calloc(DELTA_GRAMMAR_CACHE_MASKS, sizeof *c->slots);
    c->masks = calloc((size_t)DELTA_GRAMMAR_CACHE_MASKS * words, sizeof *c->masks);
    return c->slots && c->masks ? 0 : DELTA_ENOMEM;
}

void de_cache_done(de_cache *c)
{
    free(c->slots);
    free(c->masks);
    if (c->has_lock)
        (void)pthread_mutex_destroy(&c->lock);
}

typedef struct hasher {
    uint64_t a, b;
} hasher;

static void mix(hasher *h, uint32_t x)
{
    h->a = (h->a ^ x) * UINT64_C(0x9E3779B97F4A7C15);
    h->a ^= h->a >> 31;
    h->b = (h->b + x + 1) * UINT64_C(0xD6E8FEB86659FD93);
    h->b ^= h->b >> 29;
}

static uint32_t clip(uint32_t x, uint32_t max)
{
    return x < max ? x : max;
}

/* Of a count only what a token can reach matters: how far the bounds are. */
static void mix_count(const delta_matcher *m, hasher *h, uint32_t n, uint32_t min, uint32_t max)
{
    const uint32_t far = m->g->vocab->longest + 16;
    mix(h, n < min ? clip(min - n, far) : 0);
    mix(h, max == DE_MANY ? far : n > max ? far + 1 + n - max : clip(max - n, far));
    mix(h, n == 0);
}

static void mix_register(const delta_matcher *m, hasher *h, uint32_t node, uint32_t data)
{
    const de_auto *a = &m->g->a;
    const de_node *n = &a->nodes[node];
    switch ((enum de_node_kind)n->kind) {
    case DE_NODE_COUNT:
        mix_count(m, h, data, a->counts[n->arg].min, a->counts[n->arg].max);
        break;
    case DE_NODE_PARAMS:
        for (; data; data = m->cells[data].parent)
            mix(h, m->cells[data].a + 1);
        break;
    case DE_NODE_TEXT:
        mix(h, data);
        break;
    case DE_NODE_MEMBER: /* masks for which keys were compared with others are not cached */
    case DE_NODE_KEY:
        mix(h, data != 0);
        break;
    case DE_NODE_PLAIN:
    case DE_NODE_STRING:
        break;
    }
    mix(h, 0);
}

static void mix_place(const delta_matcher *m, hasher *h, const de_place *p)
{
    const de_auto *a = &m->g->a;
    const de_node *n = &a->nodes[p->node];
    mix(h, p->node);
    mix_register(m, h, p->node, p->data);
    if (n->kind == DE_NODE_TEXT) {
        const de_text_info *t = &a->texts[n->arg];
        if (t->no_nested)
            mix(h, p->more);
        else if (t->min || t->max != DE_MANY)
            mix_count(m, h, p->more, t->min, t->max);
    } else if (n->kind == DE_NODE_STRING) {
        mix_count(m, h, p->more, a->strings[n->arg].min, a->strings[n->arg].max);
    } else if (n->kind == DE_NODE_KEY) { /* a long key is near its bound */
        const uint32_t len = key_length(m, p);
        mix(h, len + m->g->vocab->longest < DE_KEY_ENOUGH ? 0 : len);
    }
}

static uint32_t top_of(const delta_matcher *m, const de_state *s, const de_place *p)
{
    uint32_t top = 0;
    for (uint32_t i = 0; i < s->n; i++)
        if (p[i].stack && m->cells[p[i].stack].depth > top)
            top = m->cells[p[i].stack].depth;
    return top;
}

/* Of the state with the frames of the stacks that are above `top - touched`; UINT32_MAX: all. */
static hasher hash_state(const delta_matcher *m, const de_state *s, const de_place *p, uint32_t top,
                         uint32_t touched)
{
    hasher h = { 1, touched };
    mix(&h, s->think);
    mix(&h, s->accepting);
    for (uint32_t i = 0; i < s->n; i++) {
        mix_place(m, &h, &p[i]);
        uint32_t c = p[i].stack;
        mix(&h, top - (c ? m->cells[c].depth : 0));
        for (; c && (touched == UINT32_MAX || m->cells[c].depth + touched > top);
             c = m->cells[c].parent) {
            mix(&h, m->cells[c].a);
            mix_register(m, &h, m->cells[c].a, m->cells[c].b);
        }
        mix(&h, UINT32_MAX);
    }
    return h;
}

enum { WHOLE = DE_CACHE_TOUCH_MAX + 1 }; /* `touched` of masks that depend on whole stacks */

static bool cache_find(delta_matcher *m, const de_state *s, const de_place *p, uint32_t *bits)
{
    de_cache *c = &m->g->cache;
    const uint32_t words = m->g->vocab->words, top = top_of(m, s, p);
    bool found = false;
    pthread_mutex_lock(&c->lock);
    c->n_masks++;
    for (uint32_t t = 0; t <= WHOLE && !found; t++) {
        if (!(c->touches >> t & 1))
            continue;
        const hasher h = hash_state(m, s, p, top, t == WHOLE ? UINT32_MAX : t);
        for (uint32_t i = 0; i < DELTA_GRAMMAR_CACHE_MASKS && !found; i++) {
            de_cached *e = &c->slots[i];
            if (!e->used || e->hash[0] != h.a || e->hash[1] != h.b || e->touched != t)
                continue;
            memcpy(bits, c->masks + (size_t)i * words, words * sizeof *bits);
            e->recent = found = true;
        }
    }
    c->n_cached += found;
    pthread_mutex_unlock(&c->lock);
    return found;
}

static void cache_put(delta_matcher *m, const de_state *s, const de_place *p, const uint32_t *bits)
{
    de_cache *c = &m->g->cache;
    const uint32_t words = m->g->vocab->words, top = top_of(m, s, p);
    uint32_t t = WHOLE;
    if (m->lowest > top)
        t = 0;
    else if (m->lowest && top - m->lowest + 1 <= DE_CACHE_TOUCH_MAX)
        t = top - m->lowest + 1;
    const hasher h = hash_state(m, s, p, top, t == WHOLE ? UINT32_MAX : t);
    pthread_mutex_lock(&c->lock);
    while (c->slots[c->hand].used && c->slots[c->hand].recent) {
        c->slots[c->hand].recent = false;
        c->hand = (c->hand + 1) % DELTA_GRAMMAR_CACHE_MASKS;
    }
    c->slots[c->hand] =
        (de_cached){ .hash = { h.a, h.b }, .touched = (uint8_t)t, .used = true, .recent = true };
    memcpy(c->masks + (size_t)c->hand * words, bits, words * sizeof *bits);
    c->hand = (c->hand + 1) % DELTA_GRAMMAR_CACHE_MASKS;
    c->touches |= UINT32_C(1) << t;
    pthread_mutex_unlock(&c->lock);
}

/* ---- free text in which something is pending */

typedef struct scan_level {
    de_state s;
    uint32_t cells;
} scan_level;

/* Takes away the tokens that go wrong: only what continues the pending can, and tokens that hold a
 * whole tag. */
static bool token_fits(delta_matcher *m, const de_state *s, uint32_t id)
{
    size_t len;
    const uint8_t *p = delta_token_bytes(m->g->vocab->tok, id, &len);
    de_state t = *s;
    const uint32_t cells = m->n_cells;
    bool ok = true;
    for (size_t i = 0; ok && i < len; i++)
        ok = de_state_step(m, &t, m->pool, m->pool + DELTA_MATCHER_PLACES, p[i]);
    de_cells_drop(m, cells);
    return ok;
}

static void text_mask(delta_matcher *m, const de_state *s, uint32_t *bits)
{
    const delta_grammar_vocab *v = m->g->vocab;
    const de_trie *t = &v->trie;
    const bool in_name = de_scan_in_name(&s->scan); /* then few go on, else few go wrong */
    if (in_name)
        memset(bits, 0, v->words * sizeof *bits);
    else
        memcpy(bits, v->text, v->words * sizeof *bits);
    de_state at[DELTA_GRAMMAR_TOKEN_BYTES + 1];
    at[0] = *s;
    for (uint32_t i = 1; i < t->n;) {
        const de_trie_node *node = &t->nodes[i];
        de_state now = at[node->depth - 1];
        const uint32_t cells = m->n_cells;
        const bool alive =
            de_state_step(m, &now, m->pool, m->pool + DELTA_MATCHER_PLACES, node->byte);
        de_cells_drop(m, cells);
        m->visited++;
        if (alive && in_name)
            for (uint32_t k = 0; k < node->n_here; k++)
                de_bit_set(bits, t->order[node->rank + k]);
        if (!alive) {
            if (!in_name)
                clear_below(t, i, bits);
        } else if (now.phase == DE_PHASE_RULES) { /* the rest of each token, one by one */
            const uint32_t end = t->nodes[node->skip].rank;
            for (uint32_t r = node->rank + node->n_here; r < end; r++) {
                if (!token_fits(m, s, t->order[r]))
                    de_bit_clear(bits, t->order[r]);
                else
                    de_bit_set(bits, t->order[r]);
            }
        } else if (!de_scan_is_calm(&now.scan)) {
            at[node->depth] = now;
            i++;
            continue;
        }
        i = node->skip;
    }
    for (uint32_t i = 0; i < v->n_think_ids && !in_name; i++)
        if (!token_fits(m, s, v->think_ids[i]))
            de_bit_clear(bits, v->think_ids[i]);
    for (uint32_t r = 0; r < t->n_order && v->has_long_tags && !in_name; r++)
        if (!token_fits(m, s, t->order[r]))
            de_bit_clear(bits, t->order[r]);
}

/* ---- the interface */

enum delta_mask_kind delta_matcher_mask(delta_matcher *m, uint32_t *bits)
{
    assert(m && bits);
    const delta_grammar_vocab *v = m->g->vocab;
    const de_state s = *de_now(m);
    const de_place *p = de_places(m);
    if (de_state_free(m, &s))
        return DELTA_MASK_FREE;
    if (s.phase == DE_PHASE_ENDED || (s.phase == DE_PHASE_RULES && s.n == 0 && !s.accepting)) {
        memset(bits, 0, v->words * sizeof *bits);
        return DELTA_MASK_DEAD;
    }
    m->visited = 0;
    m->lowest = UINT32_MAX;
    m->keys = false;
    if (s.phase != DE_PHASE_RULES) {
        text_mask(m, &s, bits);
    } else if (!cache_find(m, &s, p, bits)) {
        rules_mask(m, &s, p, bits);
        if (m->g->watch_think)
            forbid_think(m, &s, bits);
        if (m->visited > MASK_WORTH_KEEPING && !m->keys)
            cache_put(m, &s, p, bits);
    }
    if (de_state_accepting(m, &s))
        for (uint32_t i = 0; i < v->n_end_ids; i++)
            de_bit_set(bits, v->end_ids[i]);
    for (uint32_t i = 0; i < v->words; i++)
        if (bits[i])
            return DELTA_MASK_SET;
    return DELTA_MASK_DEAD;
}

void delta_grammar_stats_read(const delta_grammar *g, delta_grammar_stats *ret_s)
{
    de_cache *c = &((delta_grammar *)g)->cache; /* the lock changes, what it guards does not */
    *ret_s = (delta_grammar_stats){ .compile_ns = g->compile_ns, .nodes = g->a.n_nodes };
    pthread_mutex_lock(&c->lock);
    ret_s->masks = c->n_masks;
    ret_s->cached = c->n_cached;
    uint64_t masks = g->a.n_wides;
    for (uint32_t i = 0; i < DELTA_GRAMMAR_CACHE_MASKS; i++)
        masks += c->slots[i].used;
    pthread_mutex_unlock(&c->lock);
    ret_s->bytes = g->arena.used + g->a.cap_nodes * sizeof(de_node) +
                   g->a.cap_edges * sizeof(de_edge) + g->a.cap_calls * sizeof(de_call) +
                   masks * g->vocab->words * sizeof(uint32_t);
}
