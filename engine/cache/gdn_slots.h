/* gdn_slots.h -- which state slots of the DeltaNet layers are taken.
 *
 * Book-keeping only: the state itself is the model's, which also saves and
 * loads it (model/forward.h).
 *
 * Threads    one thread. All memory is allocated by init. */
#ifndef DE_GDN_SLOTS_H
#define DE_GDN_SLOTS_H

#include <stdint.h>

#include "delta/error.h"

typedef struct de_gdn_slots {
    uint32_t total, n_free;
    uint32_t *free; /* stack of n_free slot numbers */
} de_gdn_slots;

int de_gdn_slots_init(de_gdn_slots *s, uint32_t total, delta_error *err);
void de_gdn_slots_done(de_gdn_slots *s);

int de_gdn_slots_take(de_gdn_slots *s, uint32_t *ret_slot, delta_error *err); /* DELTA_EBUSY */
void de_gdn_slots_give(de_gdn_slots *s, uint32_t slot);

#endif
