/* gdn_slots.c -- see gdn_slots.h. */
#include "cache/gdn_slots.h"

#include <assert.h>
#include <stdlib.h>

int de_gdn_slots_init(de_gdn_slots *s, uint32_t total, delta_error *err)
{
    *s = (de_gdn_slots){ .total = total, .n_free = total };
    s->free = calloc(total ? total : 1, sizeof *s->free);
    if (!s->free)
        return delta_fail(err, DELTA_ENOMEM, "table of %u state slots", total);
    for (uint32_t i = 0; i < total; i++)
        s->free[i] = total - 1 - i;
    return 0;
}

void de_gdn_slots_done(de_gdn_slots *s)
{
    free(s->free);
    *s = (de_gdn_slots){ 0 };
}

int de_gdn_slots_take(de_gdn_slots *s, uint32_t *ret_slot, delta_error *err)
{
    if (s->n_free == 0)
        return delta_fail(err, DELTA_EBUSY, "all %u state slots are taken", s->total);
    *ret_slot = s->free[--s->n_free];
    return 0;
}

void de_gdn_slots_give(de_gdn_slots *s, uint32_t slot)
{
    assert(slot < s->total && s->n_free < s->total);
    s->free[s->n_free++] = slot;
}
