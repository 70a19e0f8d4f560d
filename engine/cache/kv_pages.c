/* kv_pages.c -- see kv_pages.h. */
#include "cache/kv_pages.h"

#include <assert.h>
#include <stdlib.h>

int de_kv_pages_init(de_kv_pages *p, uint32_t total, delta_error *err)
{
    *p = (de_kv_pages){ .total = total, .n_free = total };
    p->free = calloc(total ? total : 1, sizeof *p->free);
    p->users = calloc(total ? total : 1, sizeof *p->users);
    p->keepers = calloc(total ? total : 1, sizeof *p->keepers);
    if (!p->free || !p->users || !p->keepers) {
        de_kv_pages_done(p);
        return delta_fail(err, DELTA_ENOMEM, "table of %u KV pages", total);
    }
    for (uint32_t i = 0; i < total; i++)
        p->free[i] = total - 1 - i; /* page 0 is the first to go */
    return 0;
}

void de_kv_pages_done(de_kv_pages *p)
{
    free(p->free);
    free(p->users);
    free(p->keepers);
    *p = (de_kv_pages){ 0 };
}

int de_kv_pages_take(de_kv_pages *p, uint32_t n, uint32_t *ret_pages, delta_error *err)
{
    if (n > p->n_free)
        return delta_fail(err, DELTA_EBUSY, "%u KV pages wanted, %u of %u are free", n, p->n_free,
                          p->total);
    for (uint32_t i = 0; i < n; i++) {
        ret_pages[i] = p->free[--p->n_free];
        p->users[ret_pages[i]] = 1;
    }
    return 0;
}

void de_kv_pages_share(de_kv_pages *p, const uint32_t *pages, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        assert(pages[i] < p->total && (p->users[pages[i]] || p->keepers[pages[i]]));
        p->n_idle -= p->users[pages[i]]++ == 0;
    }
}

void de_kv_pages_give(de_kv_pages *p, const uint32_t *pages, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t page = pages[i];
        assert(page < p->total && p->users[page]);
        if (--p->users[page])
            continue;
        if (p->keepers[page])
            p->n_idle++;
        else
            p->free[p->n_free++] = page;
    }
}

void de_kv_pages_keep(de_kv_pages *p, const uint32_t *pages, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        assert(pages[i] < p->total && (p->users[pages[i]] || p->keepers[pages[i]]));
        p->keepers[pages[i]]++;
    }
}

void de_kv_pages_drop(de_kv_pages *p, const uint32_t *pages, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t page = pages[i];
        assert(page < p->total && p->keepers[page]);
        if (--p->keepers[page] || p->users[page])
            continue;
        p->n_idle--;
        p->free[p->n_free++] = page;
    }
}
