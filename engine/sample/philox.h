/* philox.h -- Philox4x32-10, a counter-based generator of random numbers.
 *
 * Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A
 * number is a pure function of key and counter: no state to keep or to share,
 * so a draw depends on (seed, position) and on nothing that ran before it. */
#ifndef DE_PHILOX_H
#define DE_PHILOX_H

#include <stdint.h>

static inline void de_philox4x32_10(const uint32_t counter[4], const uint32_t key[2],
                                    uint32_t ret[4])
{
    uint32_t c[4] = { counter[0], counter[1], counter[2], counter[3] };
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++)
        ret[i] = c[i];
}

/* Uniform in [0, 1), 53 bits, for the token at `position` of a session. */
static inline double de_philox_uniform(uint64_t seed, uint64_t position)
{
    const uint32_t key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) };
    const uint32_t counter[4] = { (uint32_t)position, (uint32_t)(position >> 32), 0, 0 };
    uint32_t r[4];
    de_philox4x32_10(counter, key, r);
    return (double)((((uint64_t)r[0] << 32) | r[1]) >> 11) * 0x1p-53;
}

#endif
