/* kv_pages.h -- which pages of the KV pool are whose.
 *
 * Book-keeping only: a page is a number below `total`, its bytes are the
 * model's. A page has users (sessions) and keepers (edges of the prefix tree,
 * prefix.h); it is free when it has neither. A page without users is idle: it
 * can be had by giving up its keepers.
 *
 * Threads    one thread. All memory is allocated by init. */
#ifndef DE_KV_PAGES_H
#define DE_KV_PAGES_H

#include <stdint.h>

#include "delta/error.h"

typedef struct de_kv_pages {
    uint32_t total, n_free, n_idle;
    uint32_t *free;            /* stack of n_free page numbers */
    uint32_t *users, *keepers; /* [total] */
} de_kv_pages;

int de_kv_pages_init(de_kv_pages *p, uint32_t total, delta_error *err);
void de_kv_pages_done(de_kv_pages *p);

/* All n pages, each with one user, or none: DELTA_EBUSY. */
int de_kv_pages_take(de_kv_pages *p, uint32_t n, uint32_t *ret_pages, delta_error *err);
void de_kv_pages_share(de_kv_pages *p, const uint32_t *pages, uint32_t n); /* one more user */
void de_kv_pages_give(de_kv_pages *p, const uint32_t *pages, uint32_t n);  /* one user less */
void de_kv_pages_keep(de_kv_pages *p, const uint32_t *pages, uint32_t n);  /* one more keeper */
void de_kv_pages_drop(de_kv_pages *p, const uint32_t *pages, uint32_t n);  /* one keeper less */

#endif
