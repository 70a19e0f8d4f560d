/* stop.c -- see stop.h. */
#include "sample/stop.h"

#include <string.h>

static uint16_t advance(const de_stop_automaton *a, uint16_t at, char byte)
{
    while (at && (at == a->len || a->bytes[at] != byte))
        at = a->fail[at - 1];
    return a->bytes[at] == byte ? (uint16_t)(at + 1) : 0;
}

void de_stop_init(de_stop *s, const delta_stop_string *strings, uint32_t n)
{
    s->n = n;
    s->n_held = 0;
    for (uint32_t i = 0; i < n; i++) {
        de_stop_automaton *a = &s->a[i];
        a->len = (uint16_t)strings[i].len;
        a->at = 0;
        memcpy(a->bytes, strings[i].bytes, a->len);
        a->fail[0] = 0;
        for (uint16_t j = 1; j < a->len; j++)
            a->fail[j] = advance(a, a->fail[j - 1], a->bytes[j]);
    }
}

size_t de_stop_push(de_stop *s, const char *bytes, size_t len, char *out, int *ret_match)
{
    if (len)
        memmove(out + s->n_held, bytes, len);
    memcpy(out, s->held, s->n_held);
    const size_t total = s->n_held + len;
    for (size_t i = s->n_held; i < total; i++) {
        uint16_t longest = 0;
        for (uint32_t k = 0; k < s->n; k++) {
            de_stop_automaton *a = &s->a[k];
            a->at = advance(a, a->at, out[i]);
            if (a->at == a->len && a->len > longest) {
                longest = a->len;
                *ret_match = (int)k;
            }
        }
        if (longest) {
            s->n_held = 0;
            return i + 1 - longest;
        }
    }
    uint16_t hold = 0;
    for (uint32_t k = 0; k < s->n; k++)
        hold = s->a[k].at > hold ? s->a[k].at : hold;
    memcpy(s->held, out + total - hold, hold);
    s->n_held = hold;
    return total - hold;
}

size_t de_stop_flush(de_stop *s, char *out)
{
    const size_t n = s->n_held;
    memcpy(out, s->held, n);
    de_stop_init(s, NULL, 0);
    return n;
}
