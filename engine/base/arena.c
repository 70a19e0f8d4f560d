/* arena.c -- see arena.h. */
#include "base/arena.h"

#include <stdlib.h>
#include <string.h>

enum { BLOCK_MIN = 4096, BLOCK_MAX = 1 << 20, ALIGN = 16 };

struct de_arena_block {
    de_arena_block *next;
    size_t size, used; /* of the bytes behind this head */
};
#define HEAD ((sizeof(de_arena_block) + ALIGN - 1) / ALIGN * ALIGN)

void de_arena_init(de_arena *a, size_t limit)
{
    *a = (de_arena){ .limit = limit };
}

void de_arena_done(de_arena *a)
{
    for (de_arena_block *b = a->head; b;) {
        de_arena_block *next = b->next;
        free(b);
        b = next;
    }
    *a = (de_arena){ .limit = a->limit };
}

void *de_arena_alloc(de_arena *a, size_t size)
{
    if (size > PTRDIFF_MAX - HEAD - ALIGN || size > a->limit || a->used > a->limit - size)
        return NULL;
    size_t need = (size + ALIGN - 1) / ALIGN * ALIGN;
    if (need == 0)
        need = ALIGN;
    de_arena_block *b = a->head;
    if (!b || b->size - b->used < need) {
        /* Blocks grow with what is in use, so that big parses take few of them. */
        size_t room = a->used < BLOCK_MIN ? BLOCK_MIN : a->used > BLOCK_MAX ? BLOCK_MAX : a->used;
        room = (room + ALIGN - 1) / ALIGN * ALIGN;
        if (room < need)
            room = need;
        if (room > SIZE_MAX - HEAD)
            return NULL;
        b = malloc(HEAD + room);
        if (!b) {
            a->is_starved = true;
            return NULL;
        }
        *b = (de_arena_block){ .next = a->head, .size = room };
        a->head = b;
    }
    void *p = (char *)b + HEAD + b->used;
    b->used += need;
    a->used += size;
    return p;
}

void *de_arena_zalloc(de_arena *a, size_t size)
{
    void *p = de_arena_alloc(a, size);
    if (p)
        memset(p, 0, size);
    return p;
}

void *de_arena_array(de_arena *a, size_t n, size_t size)
{
    if (size && n > SIZE_MAX / size)
        return NULL;
    return de_arena_alloc(a, n * size);
}

char *de_arena_strndup(de_arena *a, const char *s, size_t len)
{
    if (len == SIZE_MAX)
        return NULL;
    char *p = de_arena_alloc(a, len + 1);
    if (!p)
        return NULL;
    if (len)
        memcpy(p, s, len);
    p[len] = 0;
    return p;
}
