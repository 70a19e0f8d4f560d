/* utf8.h -- what a character of UTF-8 is (RFC 3629): no long forms, no surrogates, U+10FFFF at most. */
#ifndef DE_UTF8_H
#define DE_UTF8_H

#include <stddef.h>
#include <stdint.h>

/* n >= 1 bytes at s. The length of the character at s; or minus the length of the longest invalid
 * start (>= 1), which becomes one U+FFFD; or 0 if all n bytes are a start that may go on. */
int de_utf8_look(const void *s, size_t n);

/* The length of the character at s, 0 if there is no whole one. */
static inline size_t de_utf8_len(const void *s, size_t n)
{
    const int k = de_utf8_look(s, n);
    return k > 0 ? (size_t)k : 0;
}

/* Writes the character c (<= U+10FFFF, no surrogate) to out, 4 bytes at most; returns how many. */
size_t de_utf8_put(char *out, uint32_t c);

#endif
