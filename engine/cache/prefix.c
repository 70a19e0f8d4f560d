/* prefix.c -- see prefix.h. */
#include "cache/prefix.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

struct de_prefix_root {
    struct de_prefix_root *next;
    uint64_t owner;
    de_prefix_node node; /* from and end 0; no slot */
};

typedef struct de_prefix_root root;

static uint32_t length(const de_prefix_node *x)
{
    return x->end - x->from;
}

static uint32_t pages_until(const de_prefix *t, uint32_t tokens)
{
    return (tokens + t->page_tokens - 1) / t->page_tokens;
}

static uint32_t first_page(const de_prefix *t, const de_prefix_node *x)
{
    return x->from / t->page_tokens;
}

static uint32_t n_pages(const de_prefix *t, const de_prefix_node *x)
{
    return pages_until(t, x->end) - first_page(t, x);
}

/* How many ids a and b begin with in common, of at most n. */
static uint32_t common(const uint32_t *a, const uint32_t *b, uint32_t n)
{
    uint32_t i = 0;
    while (i < n && a[i] == b[i])
        i++;
    return i;
}

static uint32_t smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

void de_prefix_init(de_prefix *t, de_kv_pages *kv, de_gdn_slots *slots, uint32_t page_tokens,
                    uint64_t slot_bytes, uint64_t page_bytes)
{
    *t = (de_prefix){ .kv = kv,
                      .slots = slots,
                      .page_tokens = page_tokens,
                      .slot_bytes = slot_bytes,
                      .page_bytes = page_bytes };
}

static void free_node(de_prefix *t, de_prefix_node *x)
{
    de_kv_pages_drop(t->kv, x->pages, n_pages(t, x));
    de_gdn_slots_give(t->slots, x->slot);
    t->stats.nodes--;
    t->stats.tokens -= length(x);
    free(x->tokens);
    free(x->pages);
    free(x);
}

/* The node behind x in an order that has every child before its parent; NULL: that was the last. */
static de_prefix_node *first_leaf(de_prefix_node *x)
{
    while (x->children)
        x = x->children;
    return x;
}

static de_prefix_node *after(const de_prefix_node *x)
{
    return x->next ? first_leaf(x->next) : x->parent;
}

void de_prefix_done(de_prefix *t)
{
    for (root *r = t->roots, *next; r; r = next) {
        next = r->next;
        for (de_prefix_node *x = first_leaf(&r->node), *n; x != &r->node; x = n) {
            n = after(x);
            free_node(t, x);
        }
        free(r);
    }
    t->roots = NULL;
}

static root *root_of(const de_prefix *t, uint64_t owner)
{
    root *r = t->roots;
    while (r && r->owner != owner)
        r = r->next;
    return r;
}

/* The child of x that ids [n] begin with, ids being the whole prefix; at most one does. *shared
 * rises to what any child has in common with it. */
static de_prefix_node *child_of(const de_prefix_node *x, const uint32_t *ids, uint32_t n,
                                uint32_t *shared)
{
    de_prefix_node *found = NULL;
    for (de_prefix_node *c = x->children; c; c = c->next) {
        const uint32_t k = common(c->tokens, ids + x->end, smaller(length(c), n - x->end));
        if (x->end + k > *shared)
            *shared = x->end + k;
        if (k == length(c))
            found = c;
    }
    return found;
}

de_prefix_node *de_prefix_find(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n,
                               uint32_t most, uint32_t *ret_shared)
{
    de_prefix_node *found = NULL;
    root *r = root_of(t, owner);
    uint32_t shared = 0;
    t->stats.finds++;
    for (de_prefix_node *x = r ? &r->node : NULL; x; x = child_of(x, ids, n, &shared))
        if (x->end && x->end <= most)
            found = x;
    if (found) {
        found->used = ++t->clock;
        found->hits++;
        t->stats.hits++;
    }
    *ret_shared = shared;
    return found;
}

uint32_t de_prefix_reach(const de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n)
{
    const root *r = root_of(t, owner);
    uint32_t shared = 0, end = 0;
    for (const de_prefix_node *x = r ? &r->node : NULL; x; x = child_of(x, ids, n, &shared))
        end = x->end;
    return end;
}

bool de_prefix_has(const de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n)
{
    return n > 0 && de_prefix_reach(t, owner, ids, n) == n;
}

void de_prefix_pages(const de_prefix *t, const de_prefix_node *node, uint32_t *ret_pages)
{
    /* Upwards: where an edge ends inside a page, the page of the longer one has more of it. */
    uint32_t until = pages_until(t, node->end);
    for (const de_prefix_node *x = node; x->end; x = x->parent) {
        const uint32_t first = first_page(t, x);
        if (first < until)
            memcpy(ret_pages + first, x->pages, (until - first) * sizeof *ret_pages);
        until = smaller(until, first);
    }
}

/* A table of the first `n` of `a` and then `m` of `b`, or NULL. */
static uint32_t *joined(const uint32_t *a, uint32_t n, const uint32_t *b, uint32_t m)
{
    uint32_t *p = malloc(((size_t)n + m + 1) * sizeof *p);
    if (p && n)
        memcpy(p, a, n * sizeof *p);
    if (p && m)
        memcpy(p + n, b, m * sizeof *p);
    return p;
}

static void unlink_child(de_prefix_node *x)
{
    de_prefix_node **p = &x->parent->children;
    while (*p != x)
        p = &(*p)->next;
    *p = x->next;
}

static void link_child(de_prefix_node *parent, de_prefix_node *x)
{
    x->parent = parent;
    x->next = parent->children;
    parent->children = x;
}

static bool is_extension(const de_prefix_node *longer, const de_prefix_node *x)
{
    return length(longer) > length(x) && common(longer->tokens, x->tokens, length(x)) == length(x);
}

/* The edge of c loses what the new node x, its parent from now on, holds. */
static void shorten(de_prefix *t, de_prefix_node *c, const de_prefix_node *x)
{
    const uint32_t gone = x->end / t->page_tokens - first_page(t, c), rest = n_pages(t, c) - gone;
    de_kv_pages_drop(t->kv, c->pages, gone);
    memmove(c->pages, c->pages + gone, rest * sizeof *c->pages);
    memmove(c->tokens, c->tokens + length(x), (length(c) - length(x)) * sizeof *c->tokens);
    t->stats.tokens -= length(x);
    c->from = x->end;
}

static root *root_made(de_prefix *t, uint64_t owner)
{
    root *r = root_of(t, owner);
    if (!r && (r = calloc(1, sizeof *r))) {
        r->owner = owner;
        r->next = t->roots;
        t->roots = r;
    }
    return r;
}

bool de_prefix_add(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n,
                   const uint32_t *pages, uint32_t slot)
{
    root *r = root_made(t, owner);
    if (!r || n == 0)
        return false;
    de_prefix_node *at = &r->node;
    uint32_t shared = 0;
    for (de_prefix_node *c; (c = child_of(at, ids, n, &shared));)
        at = c;
    if (at->end == n) {
        at->used = ++t->clock;
        return false;
    }
    de_prefix_node *x = calloc(1, sizeof *x);
    if (!x)
        return false;
    x->from = at->end;
    x->end = n;
    x->slot = slot;
    x->used = ++t->clock;
    x->tokens = joined(ids + x->from, length(x), NULL, 0);
    x->pages = joined(pages + first_page(t, x), n_pages(t, x), NULL, 0);
    if (!x->tokens || !x->pages) {
        free(x->tokens);
        free(x->pages);
        free(x);
        return false;
    }
    de_kv_pages_keep(t->kv, x->pages, n_pages(t, x));
    for (de_prefix_node *c = at->children, *next; c; c = next) {
        next = c->next;
        if (is_extension(c, x)) {
            unlink_child(c);
            shorten(t, c, x);
            link_child(x, c);
        }
    }
    link_child(at, x);
    t->stats.nodes++;
    t->stats.tokens += length(x);
    return true;
}

/* The edge of x goes in front of that of its child c. false: no memory, nothing has changed. */
static bool lengthen(de_prefix *t, de_prefix_node *c, const de_prefix_node *x)
{
    const uint32_t whole = x->end / t->page_tokens - first_page(t, x);
    uint32_t *tokens = joined(x->tokens, length(x), c->tokens, length(c)),
             *pages = joined(x->pages, whole, c->pages, n_pages(t, c));
    if (!tokens || !pages) {
        free(tokens);
        free(pages);
        return false;
    }
    de_kv_pages_keep(t->kv, x->pages, whole);
    free(c->tokens);
    free(c->pages);
    c->tokens = tokens;
    c->pages = pages;
    c->from = x->from;
    t->stats.tokens += length(x);
    return true;
}

bool de_prefix_remove(de_prefix *t, de_prefix_node *x)
{
    assert(!x->pins && x->end);
    for (de_prefix_node *c = x->children, *next; c; c = next) {
        next = c->next;
        if (!lengthen(t, c, x))
            return false; /* those before it hang on the parent now, which is as good */
        unlink_child(c);
        link_child(x->parent, c);
    }
    unlink_child(x);
    free_node(t, x);
    return true;
}

void de_prefix_forget(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n, uint32_t from)
{
    const root *r = root_of(t, owner);
    uint32_t shared = 0;
    de_prefix_node *last = NULL;
    for (const de_prefix_node *x = r ? &r->node : NULL; x; x = last) {
        de_prefix_node *c = child_of(x, ids, n, &shared);
        if (!c)
            break;
        last = c;
    }
    while (last && last->end > from) {
        de_prefix_node *up = last->parent->end ? last->parent : NULL;
        if (last->pins || !de_prefix_remove(t, last))
            return;
        last = up;
    }
}

/* Pages that are free when x is gone. */
static uint32_t own_pages(const de_prefix *t, const de_prefix_node *x)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_pages(t, x); i++)
        n += t->kv->users[x->pages[i]] == 0 && t->kv->keepers[x->pages[i]] == 1;
    return n;
}

bool de_prefix_evict(de_prefix *t, bool for_pages)
{
    de_prefix_node *worst = NULL;
    double least = 0;
    bool frees = false; /* the worst one frees pages */
    for (root *r = t->roots; r; r = r->next)
        for (de_prefix_node *x = first_leaf(&r->node); x != &r->node; x = after(x)) {
            if (x->pins || (for_pages && x->children))
                continue;
            const uint32_t own = x->children ? 0 : own_pages(t, x);
            const double bytes = (double)t->slot_bytes + (double)own * (double)t->page_bytes;
            const double age = (double)(t->clock - x->used + 1);
            const double worth = (double)length(x) * (1.0 + x->hits) / (age * (bytes + 1));
            const bool is_better = for_pages && (own > 0) != frees ? own > 0 : worth < least;
            if (!worst || is_better) {
                worst = x;
                least = worth;
                frees = own > 0;
            }
        }
    if (!worst || !de_prefix_remove(t, worst))
        return false;
    t->stats.evictions++;
    return true;
}
