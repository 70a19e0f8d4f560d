/* line.h -- the line of runs that wait for room at the engine.
 *
 * First come, first served, but for two things. Each level of priority counts as having come
 * DD_LINE_STEP_NS earlier; and each run that its user has running or waiting already counts as having
 * come that much later, so that one who asks for a hundred things at once does not keep the others
 * waiting. A run's rank is fixed when it comes. So it is overtaken by such runs alone as come within
 * (levels above its own + runs its user had) * DD_LINE_STEP_NS of it, however many there are: nobody
 * waits for ever, and limits.max_requests_per_uid bounds the second number.
 *
 * Ownership  a place is part of the thing that waits, and must not go while it is in line.
 * Threads    one at a time. */
#ifndef DD_LINE_H
#define DD_LINE_H

#include <stdbool.h>
#include <stdint.h>

#define DD_LINE_STEP_NS (10u * UINT64_C(1000000000))

typedef struct dd_place dd_place;
struct dd_place {
    dd_place *next;
    uint64_t rank; /* smaller goes first */
};

typedef struct dd_line {
    dd_place *first;
} dd_line;

/* Of one that came at now_ns, when its user had n_others running or waiting. */
uint64_t dd_line_rank(uint64_t now_ns, int priority, uint32_t n_others);
/* Whether one of this rank has nobody before it. */
bool dd_line_is_next(const dd_line *l, uint64_t rank);
/* Puts p, whose rank is set, behind all of its rank; says how many are before it. */
uint32_t dd_line_add(dd_line *l, dd_place *p);
void dd_line_remove(dd_line *l, dd_place *p); /* no-op if it is not there */

#endif
