/* bpe.c -- one piece to tokens: byte-level merges, lowest rank first, leftmost on ties.
 *
 * Most pieces are a token of their own: found by hash, and taken if merging
 * their bytes is known to end there too. Short pieces are merged by scanning,
 * long ones with a heap, so that a piece of a megabyte is not quadratic. */
#include <stdlib.h>
#include <string.h>

#include "tokenizer/tokenizer.h"

enum { SCAN_MAX = 48 };

void de_ids_add(de_ids *ids, uint32_t id)
{
    if (ids->n == ids->cap) {
        size_t cap = ids->cap ? ids->cap * 2 : 64;
        uint32_t *p = ids->failed ? NULL : realloc(ids->p, cap * sizeof *p);
        if (!p) {
            ids->failed = true;
            return;
        }
        ids->p = p;
        ids->cap = cap;
    }
    ids->p[ids->n++] = id;
}

static void merge_by_scan(const delta_tokenizer *t, const uint8_t *p, size_t n, de_ids *ids)
{
    uint32_t id[SCAN_MAX];
    const de_merge *pair[SCAN_MAX]; /* of id[i] and id[i + 1] */
    for (size_t i = 0; i < n; i++)
        id[i] = t->byte_id[p[i]];
    for (size_t i = 0; i + 1 < n; i++)
        pair[i] = de_merge_find(t, id[i], id[i + 1]);
    for (;;) {
        const de_merge *best = NULL;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            if (pair[i] && (!best || pair[i]->rank < best->rank)) {
                best = pair[i];
                at = i;
            }
        if (!best)
            break;
        id[at] = best->id;
        memmove(id + at + 1, id + at + 2, (n - at - 2) * sizeof *id);
        if (at + 2 < n)
            memmove(pair + at + 1, pair + at + 2, (n - at - 2) * sizeof(const de_merge *));
        n--;
        if (at > 0)
            pair[at - 1] = de_merge_find(t, id[at - 1], id[at]);
        if (at + 1 < n)
            pair[at] = de_merge_find(t, id[at], id[at + 1]);
    }
    for (size_t i = 0; i < n; i++)
        de_ids_add(ids, id[i]);
}

/* ---- long pieces: a linked list of tokens and a heap of possible merges */

typedef struct node {
    uint32_t id; /* UINT32_MAX: merged away */
    uint32_t prev, next;
} node;

typedef struct candidate {
    uint32_t rank, at, left, right; /* stale unless nodes `at` and its next still are these */
} candidate;

typedef struct heap {
    candidate *p;
    size_t n;
} heap;

static bool before(const candidate *a, const candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(heap *h, candidate c)
{
    size_t i = h->n++;
    for (; i > 0 && before(&c, &h->p[(i - 1) / 2]); i = (i - 1) / 2)
        h->p[i] = h->p[(i - 1) / 2];
    h->p[i] = c;
}

static candidate heap_pop(heap *h)
{
    const candidate top = h->p[0], last = h->p[--h->n];
    size_t i = 0;
    for (size_t k; (k = 2 * i + 1) < h->n; i = k) {
        if (k + 1 < h->n && before(&h->p[k + 1], &h->p[k]))
            k++;
        if (!before(&h->p[k], &last))
            break;
        h->p[i] = h->p[k];
    }
    h->p[i] = last;
    return top;
}

static void offer(const delta_tokenizer *t, heap *h, const node *list, uint32_t at)
{
    if (at == UINT32_MAX || list[at].next == UINT32_MAX)
        return;
    const uint32_t left = list[at].id, right = list[list[at].next].id;
    const de_merge *m = de_merge_find(t, left, right);
    if (m)
        heap_push(h, (candidate){ m->rank, at, left, right });
}

static void merge_by_heap(const delta_tokenizer *t, const uint8_t *p, size_t n, de_ids *ids)
{
    node *list = malloc(n * sizeof *list);
    heap h = { .p = malloc(3 * n * sizeof(candidate)) }; /* every merge offers at most two more */
    if (!list || !h.p || n >= UINT32_MAX) {
        ids->failed = true;
        free(list);
        free(h.p);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        list[i] =
            (node){ t->byte_id[p[i]], i ? i - 1 : UINT32_MAX, i + 1 < n ? i + 1 : UINT32_MAX };
    for (uint32_t i = 0; i < n; i++)
        offer(t, &h, list, i);
    while (h.n) {
        const candidate c = heap_pop(&h);
        node *a = &list[c.at];
        if (a->id != c.left || a->next == UINT32_MAX || list[a->next].id != c.right)
            continue;
        const de_merge *m = de_merge_find(t, c.left, c.right);
        node *b = &list[a->next];
        a->id = m->id;
        b->id = UINT32_MAX;
        a->next = b->next;
        if (a->next != UINT32_MAX)
            list[a->next].prev = c.at;
        offer(t, &h, list, a->prev);
        offer(t, &h, list, c.at);
    }
    for (uint32_t i = 0; i != UINT32_MAX; i = list[i].next)
        de_ids_add(ids, list[i].id);
    free(list);
    free(h.p);
}

static void merge(const delta_tokenizer *t, const uint8_t *p, size_t n, de_ids *ids)
{
    if (n <= SCAN_MAX)
        merge_by_scan(t, p, n, ids);
    else
        merge_by_heap(t, p, n, ids);
}

void de_bpe(const delta_tokenizer *t, const uint8_t *p, size_t n, de_ids *ids)
{
    if (n == 1) {
        de_ids_add(ids, t->byte_id[*p]);
        return;
    }
    enum { UNKNOWN, YES, NO };
    const int64_t id = de_token_find(t, p, n);
    if (id >= 0) {
        atomic_uchar *state = &t->whole[id];
        if (atomic_load_explicit(state, memory_order_relaxed) == YES) {
            de_ids_add(ids, (uint32_t)id);
            return;
        }
        const size_t from = ids->n;
        merge(t, p, n, ids);
        const bool yes = !ids->failed && ids->n == from + 1 && ids->p[from] == (uint32_t)id;
        atomic_store_explicit(state, yes ? YES : NO, memory_order_relaxed);
        return;
    }
    merge(t, p, n, ids);
}
