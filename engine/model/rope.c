/* rope.c -- see rope.h. */
#include "model/rope.h"

#include <math.h>

void de_rope_frequencies(const de_shape *s, float *inv)
{
    const double d = s->rotary_dims, ln = log(s->rope_theta);
    double low = 0, high = 0;
    if (s->yarn) {
        const double L = s->yarn_original_ctx, pi2 = 6.283185307179586;
        low = floor(d * log(L / (s->yarn_beta_fast * pi2)) / (2 * ln));
        high = ceil(d * log(L / (s->yarn_beta_slow * pi2)) / (2 * ln));
        low = low < 0 ? 0 : low;
        high = high > d - 1 ? d - 1 : high;
        if (high == low)
            high += 0.001;
    }
    for (uint32_t i = 0; i < s->rotary_dims / 2; i++) {
        const float wave = powf((float)s->rope_theta, (float)(2 * i) / (float)s->rotary_dims);
        inv[i] = 1 / wave;
        if (!s->yarn)
            continue;
        const float ramp = ((float)i - (float)low) / (float)(high - low);
        const float keep = 1 - (ramp < 0 ? 0 : ramp > 1 ? 1 : ramp);
        const float slow = 1 / ((float)s->yarn_factor * wave);
        inv[i] = slow * (1 - keep) + inv[i] * keep;
    }
}
