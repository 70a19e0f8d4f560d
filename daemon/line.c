/* line.c -- see line.h. */
#include "daemon/line.h"

#include <stddef.h>

uint64_t dd_line_rank(uint64_t now_ns, int priority, uint32_t n_others)
{
    enum { LEVELS = 16 }; /* keeps the difference above 0 when the clock has just begun */
    return now_ns + ((uint64_t)(LEVELS - priority) + n_others) * DD_LINE_STEP_NS;
}

bool dd_line_is_next(const dd_line *l, uint64_t rank)
{
    return !l->first || rank < l->first->rank;
}

uint32_t dd_line_add(dd_line *l, dd_place *p)
{
    dd_place **at = &l->first;
    uint32_t n = 0;
    for (; *at && (*at)->rank <= p->rank; at = &(*at)->next)
        n++;
    p->next = *at;
    *at = p;
    return n;
}

void dd_line_remove(dd_line *l, dd_place *p)
{
    for (dd_place **at = &l->first; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            p->next = NULL;
            return;
        }
}
