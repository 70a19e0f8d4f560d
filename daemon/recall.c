/* recall.c -- see recall.h. One list of turns, the one used last in front, and a hash table of the
 * first names. */
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
    size_t names_len; /* all names, each with a NUL behind */
    size_t len, n_ids;
    uint32_t ids[]; /* then the names, and the text */
};

static char *names_of(turn *t)
{
    return (char *)(t->ids + t->n_ids);
}

struct dd_recall {
    turn *newest, *oldest;
    turn *buckets[BUCKETS];
    size_t n, bytes;
};

dd_recall *dd_recall_new(void)
{
    return calloc(1, sizeof(dd_recall));
}

static uint64_t hash_of(delta_str name)
{
    uint64_t h = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < name.len; i++)
        h = (h ^ (uint8_t)name.p[i]) * 1099511628211u;
    return h;
}

static size_t size_of(const turn *t)
{
    return sizeof *t + t->n_ids * sizeof *t->ids + t->names_len + t->len;
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

void dd_recall_put(dd_recall *r, uint32_t uid, const delta_str *names, size_t n,
                   const dd_sampled *x)
{
    size_t names_len = 0;
    for (size_t i = 0; i < n; i++)
        names_len += names[i].len + 1;
    if (n == 0 || x->text.len > DD_RECALL_TURN_BYTES || names_len > DD_RECALL_TURN_BYTES)
        return;
    turn *t = malloc(sizeof *t + x->n_ids * sizeof *t->ids + names_len + x->text.len);
    if (!t)
        return;
    *t = (turn){ .hash = hash_of(names[0]),
                 .uid = uid,
                 .thought = x->thought,
                 .names_len = names_len,
                 .len = x->text.len,
                 .n_ids = x->n_ids };
    if (x->n_ids)
        memcpy(t->ids, x->ids, x->n_ids * sizeof *t->ids);
    char *to = names_of(t);
    for (size_t i = 0; i < n; i++) {
        memcpy(to, names[i].p, names[i].len);
        to += names[i].len;
        *to++ = '\0';
    }
    if (x->text.len)
        memcpy(to, x->text.p, x->text.len);
    make_room(r, uid, size_of(t));
    t->chain = r->buckets[t->hash % BUCKETS];
    r->buckets[t->hash % BUCKETS] = t;
    link_newest(r, t);
    r->n++;
    r->bytes += size_of(t);
}

static bool has_names(turn *t, const delta_str *names, size_t n)
{
    const char *bytes = names_of(t);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const delta_str name = names[i];
        if (name.len + 1 > t->names_len - at || memcmp(bytes + at, name.p, name.len) != 0 ||
            bytes[at + name.len] != '\0')
            return false;
        at += name.len + 1;
    }
    return at == t->names_len;
}

bool dd_recall_find(dd_recall *r, uint32_t uid, const delta_str *names, size_t n,
                    dd_sampled *ret_turn)
{
    if (n == 0 || names[0].len == 0)
        return false;
    const uint64_t h = hash_of(names[0]);
    turn *t = r->buckets[h % BUCKETS];
    while (t && (t->hash != h || t->uid != uid || !has_names(t, names, n)))
        t = t->chain;
    if (!t)
        return false;
    unlink_turn(r, t);
    link_newest(r, t);
    *ret_turn = (dd_sampled){ .text = { names_of(t) + t->names_len, t->len },
                              .ids = t->ids,
                              .n_ids = t->n_ids,
                              .thought = t->thought };
    return true;
}
