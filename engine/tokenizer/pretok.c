/* pretok.c -- text to pieces: what the split pattern of tokenizer.json matches, by hand.
 *
 *   (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+ | \p{N}
 *   |  ?[^\s\p{L}\p{M}\p{N}]+[\r\n]* | \s*[\r\n]+ | \s+(?!\S) | \s+
 *
 * The first alternative that matches wins. The older pattern without \p{M} is
 * the same with marks classed as OTHER. Linear in the length of the piece. */
#include "tokenizer/tokenizer.h"

typedef struct cursor {
    const delta_tokenizer *t;
    const uint8_t *end;
} cursor;

/* Class of the character at p (p < end), and where the next begins. */
static inline enum de_class look(const cursor *c, const uint8_t *p, uint32_t *cp,
                                 const uint8_t **next)
{
    *next = p;
    *cp = de_utf8_next(next);
    return (enum de_class)c->t->classes[*cp];
}

static inline bool is_newline(uint32_t cp)
{
    return cp == '\r' || cp == '\n';
}

/* 's 't 'm 'd 're 've 'll after the apostrophe at p; NULL if none. U+017F folds to s. */
static const uint8_t *contraction(const uint8_t *p, const uint8_t *end)
{
    const size_t n = (size_t)(end - p);
    if (n < 2)
        return NULL;
    const unsigned a = p[1] | 0x20u, b = n > 2 ? p[2] | 0x20u : 0;
    if (p[1] < 0x80 && (a == 's' || a == 't' || a == 'm' || a == 'd'))
        return p + 2;
    if (n > 2 && p[1] == 0xC5 && p[2] == 0xBF)
        return p + 3;
    if (n > 2 && p[1] < 0x80 && p[2] < 0x80 &&
        ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')))
        return p + 3;
    return NULL;
}

/* Skips letters and marks. */
static const uint8_t *letters(const cursor *c, const uint8_t *p)
{
    const uint8_t *next;
    uint32_t cp;
    while (p < c->end) {
        enum de_class k = look(c, p, &cp, &next);
        if (k != DE_LETTER && k != DE_MARK)
            break;
        p = next;
    }
    return p;
}

/* A run of white space at p: up to its last newline if it has one, else all but the last
 * character if text follows, else all. */
static const uint8_t *spaces(const cursor *c, const uint8_t *p)
{
    const uint8_t *next, *after_newline = NULL, *last = p, *start = p;
    uint32_t cp;
    while (p < c->end && look(c, p, &cp, &next) == DE_SPACE) {
        last = p;
        p = next;
        if (is_newline(cp))
            after_newline = p;
    }
    if (after_newline)
        return after_newline;
    return p < c->end && last > start ? last : p;
}

const uint8_t *de_piece_end(const delta_tokenizer *t, const uint8_t *p, const uint8_t *end)
{
    const cursor c = { t, end };
    const uint8_t *next, *after, *stop;
    uint32_t cp, cp2;
    const enum de_class k = look(&c, p, &cp, &next);

    if (cp == '\'' && (stop = contraction(p, end)))
        return stop;
    if (k == DE_LETTER)
        return letters(&c, next);
    if (k == DE_NUMBER)
        return next;
    /* one character that is no newline, then letters or marks */
    enum de_class k2 = next < end ? look(&c, next, &cp2, &after) : DE_SPACE;
    if (!is_newline(cp) && next < end && (k2 == DE_LETTER || k2 == DE_MARK))
        return letters(&c, after);
    if (k == DE_MARK)
        return next; /* a mark alone */
    /* an optional space, then others, then newlines */
    const uint8_t *q = k == DE_OTHER                               ? next
                       : cp == ' ' && next < end && k2 == DE_OTHER ? after
                                                                   : NULL;
    if (!q)
        return spaces(&c, p);
    while (q < end && look(&c, q, &cp, &after) == DE_OTHER)
        q = after;
    while (q < end && is_newline(*q))
        q++;
    return q;
}
