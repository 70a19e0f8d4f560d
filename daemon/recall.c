/* recall.c -- see recall.h. One list of turns, the one used last in front, and a hash table of the
 * first ids. */
#include "daemon/recall.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/limits.h"

enum { BUCKETS = 4096 };

typedef struct turn turn;
struct turn {
    turn *newer, *older, *chain;
    uint64_t hash;
    uint32_t uid;
    bool thought;
    size_t ids_len; /* all ids, each with a NUL behind */
    size_t len;
    char bytes[]; /* ids, sampled */
};

struct dd_recall {
    turn *newest, *oldest;
    turn *buckets[BUCKETS];
    size_t n, bytes;
};

dd_recall *dd_recall_new(void)
{
    return calloc(1, sizeof(dd_recall));
}

static uint64_t hash_of(delta_str id)
{
    uint64_t h = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < id.len; i++)
        h = (h ^ (uint8_t)id.p[i]) * 1099511628211u;
    return h;
}

static size_t size_of(const turn *t)
{
    return sizeof *t + t->ids_len + t->len;
}

static void unlink_turn(dd_recall *r, turn *t)
{
    *(t->newer ? &t->newer->older : &r->newest) = t->older;
    *(t->older ? &t->older->newer : &r->oldest) = t->newer;
}

static void link_newest(dd_recall *r, turn *t)
{
    t->newer = NULL;
    t->older = r->newest;
    *(r->newest ? &r->newest->newer : &r->oldest) = t;
    r->newest = t;
}

static void drop(dd_recall *r, turn *t)
{
    turn **p = &r->buckets[t->hash % BUCKETS];
    while (*p != t)
        p = &(*p)->chain;
    *p = t->chain;
    unlink_turn(r, t);
    r->n--;
    r->bytes -= size_of(t);
    free(t);
}

void dd_recall_free(dd_recall *r)
{
    while (r && r->oldest)
        drop(r, r->oldest);
    free(r);
}

/* Until one turn more of `size` bytes fits: the user's own share, then all. */
static void make_room(dd_recall *r, uint32_t uid, size_t size)
{
    size_t n = 1, bytes = size;
    for (const turn *t = r->oldest; t; t = t->newer)
        if (t->uid == uid) {
            n++;
            bytes += size_of(t);
        }
    for (turn *t = r->oldest, *next; t; t = next) {
        next = t->newer;
        if (n <= DD_RECALL_TURNS / 4 && bytes <= DD_RECALL_BYTES / 4)
            break;
        if (t->uid == uid) {
            n--;
            bytes -= size_of(t);
            drop(r, t);
        }
    }
    while (r->oldest && (r->n >= DD_RECALL_TURNS || r->bytes + size > DD_RECALL_BYTES))
        drop(r, r->oldest);
}

void dd_recall_put(dd_recall *r, uint32_t uid, const delta_str *ids, size_t n, delta_str sampled,
                   bool thought)
{
    size_t ids_len = 0;
    for (size_t i = 0; i < n; i++)
        ids_len += ids[i].len + 1;
    if (n == 0 || sampled.len > DD_RECALL_TURN_BYTES || ids_len > DD_RECALL_TURN_BYTES)
        return;
    turn *t = malloc(sizeof *t + ids_len + sampled.len);
    if (!t)
        return;
    *t = (turn){ .hash = hash_of(ids[0]),
                 .uid = uid,
                 .thought = thought,
                 .ids_len = ids_len,
                 .len = sampled.len };
    char *to = t->bytes;
    for (size_t i = 0; i < n; i++) {
        memcpy(to, ids[i].p, ids[i].len);
        to += ids[i].len;
        *to++ = '\0';
    }
    if (sampled.len)
        memcpy(to, sampled.p, sampled.len);
    make_room(r, uid, size_of(t));
    t->chain = r->buckets[t->hash % BUCKETS];
    r->buckets[t->hash % BUCKETS] = t;
    link_newest(r, t);
    r->n++;
    r->bytes += size_of(t);
}

static bool has_ids(const turn *t, const delta_message *m)
{
    size_t at = 0;
    for (size_t i = 0; i < m->n_calls; i++) {
        const delta_str id = m->calls[i].id;
        if (id.len + 1 > t->ids_len - at || memcmp(t->bytes + at, id.p, id.len) != 0 ||
            t->bytes[at + id.len] != '\0')
            return false;
        at += id.len + 1;
    }
    return at == t->ids_len;
}

bool dd_recall_find(dd_recall *r, uint32_t uid, const delta_message *m, delta_str *ret_sampled,
                    bool *ret_thought)
{
    if (m->n_calls == 0 || m->calls[0].id.len == 0)
        return false;
    const uint64_t h = hash_of(m->calls[0].id);
    turn *t = r->buckets[h % BUCKETS];
    while (t && (t->hash != h || t->uid != uid || !has_ids(t, m)))
        t = t->chain;
    if (!t)
        return false;
    unlink_turn(r, t);
    link_newest(r, t);
    *ret_sampled = (delta_str){ t->bytes + t->ids_len, t->len };
    *ret_thought = t->thought;
    return true;
}
