/* top_logits.h -- the largest logits of a row: what a device may give of it, and what a sampler draws from.
 *
 * Ranks go by logit, the larger first, then by id, the smaller first. */
#ifndef DE_TOP_LOGITS_H
#define DE_TOP_LOGITS_H

#include <stdint.h>

enum { DE_TOP_LOGITS = 64 };

typedef struct de_candidate {
    float logit;
    uint32_t id;
} de_candidate;

typedef struct de_top_logits {
    uint32_t n;        /* the first n in rank; 0: nothing is here, the row is elsewhere, whole */
    uint32_t is_sound; /* no logit of the row is NaN or +inf; else `of` holds nothing */
    de_candidate of[DE_TOP_LOGITS];
} de_top_logits;

#endif
