/* stop.h -- stop strings in a stream of text.
 *
 * One Knuth-Morris-Pratt automaton a string. Text goes out as soon as it can
 * no longer be the beginning of a stop string, and not before. The match that
 * ends first wins; of several that end together, the longest.
 *
 * Stop strings are whole UTF-8, as the text is, so what is held back begins at
 * the border of a character and what goes out is whole characters.
 *
 * Limits     DELTA_MAX_STOP_STRINGS of DELTA_MAX_STOP_BYTES; no heap. */
#ifndef DE_STOP_H
#define DE_STOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/sampling.h"

typedef struct de_stop_automaton {
    uint16_t len, at;                    /* bytes of the string, of them matched */
    uint16_t fail[DELTA_MAX_STOP_BYTES]; /* longest proper border of the first i + 1 bytes */
    char bytes[DELTA_MAX_STOP_BYTES];
} de_stop_automaton;

typedef struct de_stop {
    uint32_t n;
    de_stop_automaton a[DELTA_MAX_STOP_STRINGS];
    char held[DELTA_MAX_STOP_BYTES];
    uint16_t n_held; /* below the length of the longest string */
} de_stop;

void de_stop_init(de_stop *s, const delta_stop_string *strings, uint32_t n);

/* Takes len bytes; writes what may go out to out (room for s->n_held + len) and returns how much
 * that is; bytes may lie there, from out + DELTA_MAX_STOP_BYTES on. *ret_match becomes the index of a stop string, or stays -1. Nothing is to be pushed
 * after a match. */
size_t de_stop_push(de_stop *s, const char *bytes, size_t len, char *out, int *ret_match);
/* There will be no more: gives out what is held (fewer than DELTA_MAX_STOP_BYTES). */
size_t de_stop_flush(de_stop *s, char *out);

#endif
