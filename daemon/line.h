/* line.h -- the line of runs that wait for room at the engine.
 *
 * First come, first served, with a head start for priority: each level counts as having come
 * DD_LINE_HEAD_START_NS earlier. So a higher priority overtakes those that came shortly before,
 * and nobody is overtaken for longer than that, however many of higher priority keep coming.
 *
 * Ownership  a place is part of the thing that waits, and must not go while it is in line.
 * Threads    one at a time. */
#ifndef DD_LINE_H
#define DD_LINE_H

#include <stdbool.h>
#include <stdint.h>

#define DD_LINE_HEAD_START_NS (10u * UINT64_C(1000000000))

typedef struct dd_place dd_place;
struct dd_place {
    dd_place *next;
    uint64_t rank; /* smaller goes first */
};

typedef struct dd_line {
    dd_place *first;
} dd_line;

/* Of one that came at now_ns. */
uint64_t dd_line_rank(uint64_t now_ns, int priority);
/* Whether one of this rank has nobody before it. */
bool dd_line_is_next(const dd_line *l, uint64_t rank);
/* Puts p, whose rank is set, behind all of its rank; says how many are before it. */
uint32_t dd_line_add(dd_line *l, dd_place *p);
void dd_line_remove(dd_line *l, dd_place *p); /* no-op if it is not there */

#endif
