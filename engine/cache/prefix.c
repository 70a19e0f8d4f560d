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

void de_prefix_init(de_prefix *t, de_kv_pages *kv, de_gdn_slots *slots, de_prefix_host *host,
                    uint32_t page_tokens, uint64_t slot_bytes, uint64_t page_bytes)
{
    *t = (de_prefix){ .kv = kv,
                      .slots = slots,
                      .host = host,
                      .page_tokens = page_tokens,
                      .slot_bytes = slot_bytes,
                      .page_bytes = page_bytes };
}

/* Does f for each page in the pool of its tier. */
static void each_page(de_prefix *t, const uint32_t *pages, uint32_t n,
                      void (*f)(de_kv_pages *p, const uint32_t *pages, uint32_t n))
{
    for (uint32_t i = 0; i < n; i++) {
        const bool is_host = pages[i] & DE_ON_HOST;
        const uint32_t page = pages[i] & ~DE_ON_HOST;
        f(is_host ? &t->host->kv : t->kv, &page, 1);
    }
}

void de_prefix_use(de_prefix *t, const uint32_t *pages, uint32_t n)
{
    each_page(t, pages, n, de_kv_pages_share);
}

void de_prefix_unuse(de_prefix *t, const uint32_t *pages, uint32_t n)
{
    each_page(t, pages, n, de_kv_pages_give);
}

static void give_slot(de_prefix *t, uint32_t slot)
{
    de_gdn_slots_give(slot & DE_ON_HOST ? &t->host->slots : t->slots, slot & ~DE_ON_HOST);
}

static void free_node(de_prefix *t, de_prefix_node *x)
{
    each_page(t, x->pages, n_pages(t, x), de_kv_pages_drop);
    give_slot(t, x->slot);
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

static void drop_copy(de_prefix_host *h, uint32_t page)
{
    const uint32_t copy = h->copy_of[page];
    h->copy_of[page] = (uint32_t)DE_NO_COPY;
    h->n_copies--;
    de_kv_pages_drop(&h->kv, &copy, 1);
}

/* Any of them, one after the other. false: there is none. */
static bool drop_some_copy(de_prefix *t)
{
    de_prefix_host *h = t->host;
    if (h->n_copies == 0)
        return false;
    for (; h->copy_of[h->next_copy] == (uint32_t)DE_NO_COPY;)
        h->next_copy = (h->next_copy + 1) % t->kv->total;
    drop_copy(h, h->next_copy);
    return true;
}

void de_prefix_done(de_prefix *t)
{
    while (t->host && drop_some_copy(t))
        ;
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
        if (x->end && x->end <= most && !x->is_bad)
            found = x;
    if (found) {
        found->used = ++t->clock;
        found->used_ns = t->now_ns;
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

static de_prefix_node *deepest(const de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n)
{
    root *r = root_of(t, owner);
    uint32_t shared = 0;
    de_prefix_node *found = NULL;
    for (de_prefix_node *x = r ? &r->node : NULL; x; x = child_of(x, ids, n, &shared))
        found = x;
    return found && found->end ? found : NULL;
}

void de_prefix_guard(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n,
                     uint32_t *ret_end, uint64_t *ret_serial)
{
    de_prefix_node *x = deepest(t, owner, ids, n);
    *ret_end = x ? x->end : 0;
    *ret_serial = x ? x->serial : 0;
    if (x)
        x->guards++;
}

void de_prefix_unguard(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t end,
                       uint64_t serial)
{
    de_prefix_node *x = end ? deepest(t, owner, ids, end) : NULL;
    if (x && x->serial == serial)
        x->guards--;
}

de_prefix_node *de_prefix_pin(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n)
{
    de_prefix_node *x = deepest(t, owner, ids, n);
    if (x)
        x->pins++;
    return x;
}

de_prefix_node *de_prefix_idle(const de_prefix *t, uint64_t before_ns, uint64_t *ret_owner)
{
    de_prefix_node *found = NULL;
    for (root *r = t->roots; r; r = r->next)
        for (de_prefix_node *x = first_leaf(&r->node); x != &r->node; x = after(x)) {
            const bool is_inner = x->children && !x->children->next;
            if (is_inner || x->record || x->is_bad || x->used_ns >= before_ns ||
                (found && x->end >= found->end))
                continue;
            found = x;
            *ret_owner = r->owner;
        }
    return found;
}

void de_prefix_ids(const de_prefix_node *node, uint32_t *ret_ids)
{
    for (const de_prefix_node *x = node; x->end; x = x->parent)
        memcpy(ret_ids + x->from, x->tokens, length(x) * sizeof *ret_ids);
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

void de_prefix_taken(de_prefix *t, const uint32_t *pages, uint32_t n)
{
    de_prefix_host *h = t->host;
    for (uint32_t i = 0; h && h->n_copies && i < n; i++)
        if (h->copy_of[pages[i]] != (uint32_t)DE_NO_COPY)
            drop_copy(h, pages[i]);
}

void de_prefix_loaded(de_prefix *t, uint32_t from, uint32_t page)
{
    de_prefix_host *h = t->host;
    from &= ~DE_ON_HOST;
    if (!h->copy_of || h->copy_of[page] != (uint32_t)DE_NO_COPY)
        return;
    de_kv_pages_keep(&h->kv, &from, 1);
    h->copy_of[page] = from;
    h->n_copies++;
}

void de_prefix_moved_in(de_prefix *t, de_prefix_node *node, const uint32_t *pages, uint32_t n)
{
    for (de_prefix_node *x = node; x->end; x = x->parent)
        for (uint32_t i = 0; i < n_pages(t, x) && first_page(t, x) + i < n; i++) {
            uint32_t *page = &x->pages[i];
            if (!(*page & DE_ON_HOST))
                continue;
            each_page(t, page, 1, de_kv_pages_drop);
            *page = pages[first_page(t, x) + i];
            de_kv_pages_keep(t->kv, page, 1);
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
    each_page(t, c->pages, gone, de_kv_pages_drop);
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
        at->used_ns = t->now_ns;
        return false;
    }
    de_prefix_node *x = calloc(1, sizeof *x);
    if (!x)
        return false;
    x->from = at->end;
    x->end = n;
    x->slot = slot;
    x->used = ++t->clock;
    x->used_ns = t->now_ns;
    x->serial = ++t->last_serial;
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
    each_page(t, x->pages, whole, de_kv_pages_keep);
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
        if (last->pins)
            last->is_bad = true;
        else if (!de_prefix_remove(t, last))
            return;
        last = up;
    }
}

void de_prefix_unpin(de_prefix *t, de_prefix_node *x)
{
    if (--x->pins == 0 && x->is_bad)
        (void)de_prefix_remove(t, x);
}

/* Pages of a tier that are free when x is gone. */
static uint32_t own_pages(const de_prefix *t, const de_prefix_node *x, bool on_host)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_pages(t, x); i++) {
        const uint32_t page = x->pages[i] & ~DE_ON_HOST;
        if (!(x->pages[i] & DE_ON_HOST) == on_host)
            continue;
        const de_kv_pages *p = on_host ? &t->host->kv : t->kv;
        n += p->users[page] == 0 && p->keepers[page] == 1;
    }
    return n;
}

static double worth(const de_prefix *t, const de_prefix_node *x, uint32_t own, bool slot)
{
    const double bytes = (slot ? (double)t->slot_bytes : 0) + (double)own * (double)t->page_bytes;
    const double again = x->record && x->record != DE_NO_RECORD ? 1.0 / 8 : 1; /* it can be read */
    /* Something went on from it already: who comes back comes back to the end of that. */
    const double passed = x->children && !x->children->next ? 1.0 / 8 : 1;
    return (double)length(x) * again * passed * (1.0 + x->hits) /
           ((double)(t->clock - x->used + 1) * (bytes + 1));
}

/* What is wanted of a node that is to go. */
struct wish {
    bool pages;   /* pages are short, not slots */
    bool on_host; /* of the second tier */
    bool moves;   /* it will move: a node with children frees its pages, too */
    const de_prefix_node *but;
};

/* The node worth least that frees what is wanted, of those that nobody guards if there are any. For
 * pages that stay, a leaf that frees none will do if no other does: with others like it gone, its
 * pages go. */
static de_prefix_node *least(const de_prefix *t, const struct wish *w)
{
    de_prefix_node *found = NULL;
    double found_worth = 0;
    bool found_frees = false, found_guarded = false;
    for (root *r = t->roots; r; r = r->next)
        for (de_prefix_node *x = first_leaf(&r->node); x != &r->node; x = after(x)) {
            const bool has_slot = !(x->slot & DE_ON_HOST) != w->on_host;
            if (x->pins || x == w->but || (w->pages ? x->children && !w->moves : !has_slot))
                continue;
            const uint32_t own = x->children && !w->moves ? 0 : own_pages(t, x, w->on_host);
            if (w->pages && w->moves && own == 0)
                continue;
            const double v = worth(t, x, own, has_slot);
            const bool frees = own > 0, guarded = x->guards > 0;
            if (!found || (guarded != found_guarded           ? found_guarded
                           : w->pages && frees != found_frees ? frees
                                                              : v < found_worth)) {
                found = x;
                found_worth = v;
                found_frees = frees;
                found_guarded = guarded;
            }
        }
    return found;
}

/* Room in the second tier for a slot, or not, and n pages. */
static bool make_host_room(de_prefix *t, const de_prefix_node *but, bool slot, uint32_t n)
{
    de_prefix_host *h = t->host;
    if (n > h->kv.total || (slot && h->slots.total == 0))
        return false;
    while ((slot && h->slots.n_free == 0) || h->kv.n_free < n) {
        const bool pages = h->kv.n_free < n;
        if (pages && drop_some_copy(t))
            continue;
        de_prefix_node *x = least(t, &(struct wish){ .pages = pages, .on_host = true, .but = but });
        if (!x || !de_prefix_remove(t, x))
            return false;
        t->stats.evictions++;
    }
    return true;
}

/* Whether a page is on the device and one edge's alone. */
static bool is_own(const de_prefix *t, uint32_t page)
{
    return !(page & DE_ON_HOST) && t->kv->users[page] == 0 && t->kv->keepers[page] == 1;
}

/* To the second tier, with all that nobody else has; false: as before. */
static bool move_out(de_prefix *t, de_prefix_node *x)
{
    de_prefix_host *h = t->host;
    const bool slot = !(x->slot & DE_ON_HOST);
    uint32_t n = own_pages(t, x, false); /* to be copied */
    for (uint32_t i = 0; h->n_copies && i < n_pages(t, x); i++)
        n -= is_own(t, x->pages[i]) && h->copy_of[x->pages[i]] != (uint32_t)DE_NO_COPY;
    if (!make_host_room(t, x, slot, n))
        return false;
    for (uint32_t i = 0; i < n_pages(t, x); i++) {
        const uint32_t page = x->pages[i];
        uint32_t to;
        if (!is_own(t, page))
            continue;
        if (h->copy_of && h->copy_of[page] != (uint32_t)DE_NO_COPY) {
            x->pages[i] = h->copy_of[page] | DE_ON_HOST; /* the edge's own again */
            h->copy_of[page] = (uint32_t)DE_NO_COPY;
            h->n_copies--;
            de_kv_pages_drop(t->kv, &page, 1);
            continue;
        }
        while (de_kv_pages_take(&h->kv, 1, &to, NULL) < 0)
            if (!drop_some_copy(t))
                return false;
        const bool failed = h->page_out(h->arg, page, to) < 0;
        if (!failed) {
            de_kv_pages_keep(&h->kv, &to, 1);
            de_kv_pages_drop(t->kv, &page, 1);
            x->pages[i] = to | DE_ON_HOST;
        }
        de_kv_pages_give(&h->kv, &to, 1);
        if (failed)
            return false;
    }
    uint32_t to;
    if (slot && de_gdn_slots_take(&h->slots, &to, NULL) == 0) {
        if (h->slot_out(h->arg, x->slot, to) < 0) {
            de_gdn_slots_give(&h->slots, to);
            return false;
        }
        de_gdn_slots_give(t->slots, x->slot);
        x->slot = to | DE_ON_HOST;
    }
    t->stats.moves++;
    return true;
}

bool de_prefix_evict(de_prefix *t, bool for_pages)
{
    if (t->host) {
        de_prefix_node *x = least(t, &(struct wish){ .pages = for_pages, .moves = true });
        if (x && move_out(t, x))
            return true;
    }
    de_prefix_node *x = least(t, &(struct wish){ .pages = for_pages });
    if (!x || !de_prefix_remove(t, x))
        return false;
    t->stats.evictions++;
    return true;
}
