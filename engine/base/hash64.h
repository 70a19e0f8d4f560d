/* hash64.h -- 64 bits that tell damage of a file and find a sequence of tokens; no secret rests on them. */
#ifndef DE_HASH64_H
#define DE_HASH64_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t de_hash64_word(uint64_t h, uint64_t word)
{
    h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 32;
}

/* h: of what came before, or a seed; not 0, or leading zeros would not count. */
static inline uint64_t de_hash64(uint64_t h, const void *bytes, size_t n)
{
    const uint8_t *p = (const uint8_t *)bytes;
    uint64_t word;
    for (; n >= sizeof word; n -= sizeof word, p += sizeof word) {
        memcpy(&word, p, sizeof word);
        h = de_hash64_word(h, word);
    }
    for (; n; n--, p++)
        h = (h ^ *p) * UINT64_C(0x100000001b3);
    return h;
}

#endif
