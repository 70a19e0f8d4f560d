/* arena.h -- memory that goes in one call: bump allocation in blocks.
 *
 * Ownership  whoever inits it calls de_arena_done(). Nothing is freed singly.
 * Threads    one thread at a time.
 * Limits     `limit` bytes in all; past it, and when malloc fails, allocation
 *            returns NULL and the arena stays usable. */
#ifndef DE_ARENA_H
#define DE_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct de_arena_block de_arena_block;
typedef struct de_arena {
    de_arena_block *head;
    size_t used, limit; /* bytes handed out, and the most there may be */
    bool is_starved;    /* malloc failed once: what was missing was memory, not the limit */
} de_arena;

void de_arena_init(de_arena *a, size_t limit);
void de_arena_done(de_arena *a);

/* Aligned to 16; size 0 gives a valid pointer. NULL past the limit. */
void *de_arena_alloc(de_arena *a, size_t size);
void *de_arena_zalloc(de_arena *a, size_t size);
/* n * size, checked for overflow. */
void *de_arena_array(de_arena *a, size_t n, size_t size);
/* A NUL-terminated copy of len bytes. */
char *de_arena_strndup(de_arena *a, const char *s, size_t len);

#endif
