/* bits.h -- checked and rounding integer arithmetic. */
#ifndef DE_BITS_H
#define DE_BITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline uint64_t de_ceil_div(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

/* to: a power of two; a must leave room */
static inline uint64_t de_align_up(uint64_t a, uint64_t to)
{
    return (a + to - 1) & ~(to - 1);
}

/* true: *ret holds the result; false: it did not fit and *ret is untouched */
static inline bool de_add_u64(uint64_t a, uint64_t b, uint64_t *ret)
{
    uint64_t r;
    if (__builtin_add_overflow(a, b, &r))
        return false;
    *ret = r;
    return true;
}

static inline bool de_mul_u64(uint64_t a, uint64_t b, uint64_t *ret)
{
    uint64_t r;
    if (__builtin_mul_overflow(a, b, &r))
        return false;
    *ret = r;
    return true;
}

#endif
