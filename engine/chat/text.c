/* text.c -- see text.h. */
#include "chat/text.h"

/* One byte: U+0009 .. U+000D, U+001C .. U+0020. */
static bool is_space1(unsigned char c)
{
    return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20);
}

/* U+0085 and U+00A0. */
static bool is_space2(const unsigned char *s)
{
    return s[0] == 0xC2 && (s[1] == 0x85 || s[1] == 0xA0);
}

/* U+1680, U+2000 .. U+200A, U+2028, U+2029, U+202F, U+205F, U+3000. */
static bool is_space3(const unsigned char *s)
{
    switch (s[0]) {
    case 0xE1:
        return s[1] == 0x9A && s[2] == 0x80;
    case 0xE2:
        if (s[1] == 0x80)
            return (s[2] >= 0x80 && s[2] <= 0x8A) || s[2] == 0xA8 || s[2] == 0xA9 || s[2] == 0xAF;
        return s[1] == 0x81 && s[2] == 0x9F;
    case 0xE3:
        return s[1] == 0x80 && s[2] == 0x80;
    default:
        return false;
    }
}

size_t de_space_at_start(const char *s, size_t len)
{
    const unsigned char *u = (const unsigned char *)s;
    if (len >= 1 && is_space1(u[0]))
        return 1;
    if (len >= 2 && is_space2(u))
        return 2;
    return len >= 3 && is_space3(u) ? 3 : 0;
}

size_t de_space_at_end(const char *s, size_t len)
{
    if (len == 0) /* s may be NULL */
        return 0;
    const unsigned char *end = (const unsigned char *)s + len;
    if (is_space1(end[-1]))
        return 1;
    if (len >= 2 && is_space2(end - 2))
        return 2;
    return len >= 3 && is_space3(end - 3) ? 3 : 0;
}

delta_str de_strip(delta_str s)
{
    size_t n;
    while ((n = de_space_at_start(s.p, s.len)) > 0) {
        s.p += n;
        s.len -= n;
    }
    while ((n = de_space_at_end(s.p, s.len)) > 0)
        s.len -= n;
    return s;
}
