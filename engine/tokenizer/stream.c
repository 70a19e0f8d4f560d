/* stream.c -- bytes of tokens to whole characters. Invalid bytes become U+FFFD
 * as in any standard decoder: one for each maximal start of a character. */
#include <string.h>

#include "tokenizer/tokenizer.h"

static size_t put(char *out, size_t cap, size_t n, const void *p, size_t len)
{
    if (n + len <= cap)
        memcpy(out + n, p, len);
    return n + len <= cap ? n + len : n;
}

static const char replacement[] = "\xEF\xBF\xBD";

size_t delta_detok_push(delta_detok *d, const uint8_t *bytes, size_t len, char *out, size_t cap)
{
    size_t n = 0;
    while (len) {
        if (d->n_held == 0) { /* the common run of whole characters */
            int k = de_utf8_look(bytes, len);
            if (k > 0) {
                n = put(out, cap, n, bytes, (size_t)k);
                bytes += k;
                len -= (size_t)k;
                continue;
            }
        }
        d->held[d->n_held++] = *bytes++;
        len--;
        int k;
        while (d->n_held && (k = de_utf8_look(d->held, d->n_held)) != 0) {
            if (k > 0)
                n = put(out, cap, n, d->held, (size_t)k);
            else
                n = put(out, cap, n, replacement, 3);
            const size_t used = (size_t)(k > 0 ? k : -k);
            memmove(d->held, d->held + used, d->n_held - used);
            d->n_held = (uint8_t)(d->n_held - used);
        }
    }
    return n;
}

size_t delta_detok_flush(delta_detok *d, char *out, size_t cap)
{
    const bool any = d->n_held > 0;
    d->n_held = 0;
    return any ? put(out, cap, 0, replacement, 3) : 0;
}
