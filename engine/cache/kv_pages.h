/* kv_pages.h -- which pages of the KV pool are whose.
 *
 * Book-keeping only: a page is a number below `total`, its bytes are the
 * model's. A page has a count of owners; it is free when that is 0. Sharing a
 * prefix is one more owner of each of its pages.
 *
 * Threads    one thread. All memory is allocated by init. */
#ifndef DE_KV_PAGES_H
#define DE_KV_PAGES_H

#include <stdint.h>

#include "delta/error.h"

typedef struct de_kv_pages {
    uint32_t total, n_free;
    uint32_t *free;   /* stack of n_free page numbers */
    uint32_t *owners; /* [total] */
} de_kv_pages;

int de_kv_pages_init(de_kv_pages *p, uint32_t total, delta_error *err);
void de_kv_pages_done(de_kv_pages *p);

/* All n pages, each with one owner, or none: DELTA_EBUSY. */
int de_kv_pages_take(de_kv_pages *p, uint32_t n, uint32_t *ret_pages, delta_error *err);
void de_kv_pages_share(de_kv_pages *p, const uint32_t *pages, uint32_t n); /* one more owner */
void de_kv_pages_give(de_kv_pages *p, const uint32_t *pages, uint32_t n);  /* one owner less */

#endif
