/* text.h -- what template and output parser both know of text: Python's white space.
 *
 * The template's `trim` is Python's str.strip(): it takes off every character
 * that str.isspace() names, which is more than C's isspace() and not quite
 * what Unicode calls White_Space (U+001C .. U+001F are in). */
#ifndef DE_CHAT_TEXT_H
#define DE_CHAT_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "delta/chat.h"

#define DE_STR(literal) ((delta_str){ (literal), sizeof(literal) - 1 })

/* Bytes of the white-space character at the start of s, 0 if there is none. */
size_t de_space_at_start(const char *s, size_t len);
/* The same for the character that ends s. */
size_t de_space_at_end(const char *s, size_t len);

delta_str de_strip(delta_str s); /* both ends */

static inline bool de_starts_with(delta_str s, delta_str with)
{
    return s.len >= with.len && memcmp(s.p, with.p, with.len) == 0;
}

static inline bool de_ends_with(delta_str s, delta_str with)
{
    return s.len >= with.len && memcmp(s.p + s.len - with.len, with.p, with.len) == 0;
}

static inline bool de_str_eq(delta_str a, delta_str b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.p, b.p, a.len) == 0);
}

#endif
