/* Rotary frequencies, bit for bit those of the reference implementation (transformers 5.23). An
 * angle is position times frequency in f32, so a last bit that differs is seen at long positions. */
#include "support/tap.h"

#include "model/rope.h"

static void check(const de_shape *s, const uint32_t *want)
{
    float inv[32];
    de_rope_frequencies(s, inv);
    for (uint32_t i = 0; i < 32; i++) {
        uint32_t bits;
        memcpy(&bits, &inv[i], 4);
        if (bits != want[i])
            TAP_FAIL("frequency %u is %a (0x%08x), expected 0x%08x", i, (double)inv[i], bits,
                     want[i]);
    }
}

TEST(rope_frequencies_have_the_bits_of_the_reference)
{
    static const uint32_t want[32] = {
        0x3f800000, 0x3f1ab32b, 0x3ebaf81b, 0x3e61f835, 0x3e088d77, 0x3da50956, 0x3d47763f,
        0x3cf11177, 0x3c91ad39, 0x3c301052, 0x3bd4ca15, 0x3b80967d, 0x3b1b690d, 0x3abbd3ed,
        0x3a6301e2, 0x3a092e02, 0x39a5cb60, 0x394860c1, 0x38f22ce2, 0x3892587e, 0x3830df52,
        0x37d5c441, 0x37812dab, 0x371c1fc4, 0x36bcb0c1, 0x36640cc6, 0x3609cf4a, 0x35a68e4c,
        0x35494c57, 0x34f3499d, 0x3493048e, 0x3431af44,
    };
    check(&(de_shape){ .rotary_dims = 64, .rope_theta = 1e7 }, want);
}

TEST(yarn_frequencies_have_the_bits_of_the_reference)
{
    static const uint32_t want[32] = {
        0x3f800000, 0x3f1ab32b, 0x3ebaf81b, 0x3e61f835, 0x3e088d77, 0x3da50956, 0x3d47763f,
        0x3cf11177, 0x3c91ad39, 0x3c301052, 0x3bd4ca15, 0x3b80967d, 0x3b1b690d, 0x3abbd3ed,
        0x3a6301e2, 0x39f8a364, 0x3986b53e, 0x3910058b, 0x38975c0d, 0x381b7e06, 0x379ac368,
        0x3712f6ed, 0x36812dab, 0x361c1fc4, 0x35bcb0c1, 0x35640cc6, 0x3509cf4a, 0x34a68e4c,
        0x34494c57, 0x33f3499d, 0x3393048e, 0x3331af44,
    };
    const de_shape s = { .rotary_dims = 64,
                         .rope_theta = 1e7,
                         .yarn = true,
                         .yarn_factor = 4,
                         .yarn_beta_fast = 32,
                         .yarn_beta_slow = 1,
                         .yarn_original_ctx = 262144 };
    check(&s, want);
}
