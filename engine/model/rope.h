/* rope.h -- rotary frequencies. */
#ifndef DE_ROPE_H
#define DE_ROPE_H

#include "model/shape.h"

/* Rotary frequencies [rotary_dims / 2], YaRN over the rotary dims. In f32 throughout, as the
 * reference implementation computes them: at position 100,000 one bit of a frequency is 0.005 of a
 * radian, so a rounder number would be a worse one. */
void de_rope_frequencies(const de_shape *s, float *inv);

/* The axis (t, h, w) whose position turns pair i: interleaved sections. */
static inline uint32_t de_rope_axis(const de_shape *s, uint32_t i)
{
    const uint32_t axis = i % 3;
    return axis && i >= 3 * s->mrope_section[axis] ? 0 : axis;
}

#endif
