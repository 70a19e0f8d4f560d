/* bf16.h -- storage types to float. */
#ifndef DE_BF16_H
#define DE_BF16_H

#include <stdint.h>
#include <string.h>

static inline float de_bf16_to_float(uint16_t b)
{
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline float de_f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3FF, u;
    if (exponent == 0) { /* zero or subnormal: fraction * 2^-24 */
        float f = (float)fraction * 0x1p-24f;
        return sign ? -f : f;
    }
    u = sign | (exponent == 31 ? 0xFFu : exponent + 112) << 23 | fraction << 13;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

#endif
