/* snapshot.c -- see delta/cache.h.
 *
 * The file, in this machine's byte order: a head, then a record for each node of the prefix tree,
 * parents before their children:
 *
 *   owner, from, end; tokens [end - from]; the state; the pages that the edge touches; a hash
 *
 * A record is taken up only where its parent is still in the tree: between two records steps are
 * taken, and those may need the room. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "api/internal.h"
#include "delta/cache.h"

typedef struct head {
    char magic[16];
    uint64_t model, slot_bytes, page_bytes, page_tokens, n_records;
} head;

typedef struct record {
    uint64_t owner;
    uint32_t from, end;
} record;

static const char magic[16] = "deltad cache 1\n";

struct delta_cache_reader {
    delta_engine *e;
    FILE *f;
    char *path;
    uint64_t n_left;
    uint32_t *ids, *pages; /* of the record before: those of its parents are its beginning */
    uint8_t *bytes;        /* of a state or a page, whichever is larger */
};

static uint64_t hash(uint64_t h, const void *bytes, size_t n)
{
    const uint8_t *p = bytes;
    uint64_t word;
    for (; n >= sizeof word; n -= sizeof word, p += sizeof word) {
        memcpy(&word, p, sizeof word);
        h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        h ^= h >> 32;
    }
    for (; n; n--, p++)
        h = (h ^ *p) * UINT64_C(0x100000001b3);
    return h;
}

/* What the states are of. */
static uint64_t model_of(const delta_engine *e)
{
    uint64_t h = hash(1, e->info.backend, strlen(e->info.backend));
    const uint32_t n = (uint32_t)de_weights_count(e->weights);
    uint32_t shards = 0;
    for (uint32_t i = 0; i < n; i++) {
        const de_tensor *t = de_weights_at(e->weights, i);
        h = hash(h, t->name, strlen(t->name));
        h = hash(h, &t->offset, sizeof t->offset);
        shards = t->shard >= shards ? t->shard + 1 : shards;
    }
    for (uint32_t i = 0; i < shards; i++) {
        struct stat st = { 0 };
        (void)stat(de_weights_shard_path(e->weights, i), &st);
        const int64_t at[] = { st.st_size, st.st_mtim.tv_sec, st.st_mtim.tv_nsec };
        h = hash(h, at, sizeof at);
    }
    return h;
}

static head head_of(const delta_engine *e)
{
    head h = { .model = model_of(e),
               .slot_bytes = e->prefix.slot_bytes,
               .page_bytes = e->prefix.page_bytes,
               .page_tokens = DE_PAGE };
    memcpy(h.magic, magic, sizeof magic);
    return h;
}

static uint32_t pages_of(uint32_t from, uint32_t end)
{
    return (end + DE_PAGE - 1) / DE_PAGE - from / DE_PAGE;
}

static uint64_t bytes_of(const delta_engine *e, uint32_t from, uint32_t end)
{
    return sizeof(record) + (uint64_t)(end - from) * sizeof(uint32_t) + e->prefix.slot_bytes +
           (uint64_t)pages_of(from, end) * e->prefix.page_bytes + sizeof(uint64_t);
}

static size_t buffer_bytes(const delta_engine *e)
{
    const uint64_t s = e->prefix.slot_bytes, p = e->prefix.page_bytes;
    return (size_t)(s > p ? s : p) + 1;
}

/* ---- writing */

typedef struct writer {
    delta_engine *e;
    FILE *f;
    uint8_t *bytes;
    uint64_t hash, left;
    uint32_t n;
    delta_error *err;
} writer;

static bool put(writer *w, const void *bytes, size_t n)
{
    w->hash = hash(w->hash, bytes, n);
    return n == 0 || fwrite(bytes, n, 1, w->f) == 1;
}

/* 0, or < 0: the device failed; *ret_ok false: the file. */
static int put_node(writer *w, uint64_t owner, const de_prefix_node *x, bool *ret_ok)
{
    delta_engine *e = w->e;
    const record r = { .owner = owner, .from = x->from, .end = x->end };
    const uint8_t *from = w->bytes;
    int result = 0;
    w->hash = 0;
    *ret_ok = put(w, &r, sizeof r) && put(w, x->tokens, (x->end - x->from) * sizeof *x->tokens);
    if (x->slot & DE_ON_HOST)
        from = de_host_slot(e, x->slot);
    else
        result = de_model_slot_save(e->model, x->slot, w->bytes, w->err);
    *ret_ok = *ret_ok && put(w, from, (size_t)e->prefix.slot_bytes);
    for (uint32_t i = 0; result == 0 && *ret_ok && i < pages_of(x->from, x->end); i++) {
        from = w->bytes;
        if (x->pages[i] & DE_ON_HOST)
            from = de_host_page(e, x->pages[i]);
        else
            result = de_model_page_save(e->model, x->pages[i], w->bytes, w->err);
        *ret_ok = put(w, from, (size_t)e->prefix.page_bytes);
    }
    const uint64_t sum = w->hash;
    *ret_ok = *ret_ok && put(w, &sum, sizeof sum);
    return result;
}

/* x and what is below it, as far as there is room. */
static int put_tree(writer *w, uint64_t owner, const de_prefix_node *x, bool *ret_ok)
{
    const uint64_t n = x->end ? bytes_of(w->e, x->from, x->end) : 0;
    *ret_ok = true;
    if (n > w->left)
        return 0;
    w->left -= n;
    if (x->end) {
        int r = put_node(w, owner, x, ret_ok);
        if (r < 0 || !*ret_ok)
            return r;
        w->n++;
    }
    for (const de_prefix_node *c = x->children; c; c = c->next) {
        int r = put_tree(w, owner, c, ret_ok);
        if (r < 0 || !*ret_ok)
            return r;
    }
    return 0;
}

static int write_all(writer *w)
{
    head h = head_of(w->e);
    bool ok = fwrite(&h, sizeof h, 1, w->f) == 1;
    uint64_t owner = 0;
    int r = 0;
    for (const de_prefix_node *x = NULL;
         r == 0 && ok && (x = de_prefix_root(&w->e->prefix, x, &owner));)
        r = put_tree(w, owner, x, &ok);
    h.n_records = w->n;
    ok = ok && fseek(w->f, 0, SEEK_SET) == 0 && fwrite(&h, sizeof h, 1, w->f) == 1 &&
         fflush(w->f) == 0 && fsync(fileno(w->f)) == 0;
    if (r == 0 && !ok)
        r = delta_fail(w->err, errno == ENOSPC || errno == EFBIG ? DELTA_ELIMIT : DELTA_EIO,
                       "writing the cache: %s", strerror(errno));
    return r;
}

int delta_cache_save(delta_engine *e, const char *path, uint64_t max_bytes, uint32_t *ret_n,
                     delta_error *err)
{
    char *new = malloc(strlen(path) + 5);
    writer w = { .e = e, .bytes = malloc(buffer_bytes(e)), .left = max_bytes, .err = err };
    int r = 0;
    *ret_n = 0;
    if (!new || !w.bytes) {
        r = delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
    } else {
        (void)sprintf(new, "%s.new", path);
        const int fd = open(new, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
        w.f = fd < 0 ? NULL : fdopen(fd, "wb");
        if (!w.f)
            r = delta_fail(err, DELTA_EIO, "%s: %s", new, strerror(errno));
    }
    if (r == 0) {
        r = write_all(&w);
        if (fclose(w.f) != 0 && r == 0)
            r = delta_fail(err, DELTA_EIO, "%s: %s", new, strerror(errno));
        if (r == 0 && rename(new, path) < 0)
            r = delta_fail(err, DELTA_EIO, "%s: %s", path, strerror(errno));
        if (r < 0)
            (void)unlink(new);
        else
            *ret_n = w.n;
    }
    free(new);
    free(w.bytes);
    return r;
}

/* ---- reading */

int delta_cache_open(delta_engine *e, const char *path, delta_cache_reader **ret_r,
                     delta_error *err)
{
    const head want = head_of(e);
    head h;
    delta_cache_reader *r = calloc(1, sizeof *r);
    if (!r)
        return delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
    const size_t n = e->info.ctx_max + 1u;
    r->e = e;
    r->path = strdup(path);
    r->ids = malloc(n * sizeof *r->ids);
    r->pages = malloc((n / DE_PAGE + 2) * sizeof *r->pages);
    r->bytes = malloc(buffer_bytes(e));
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    int result = 0;
    if (!r->path || !r->ids || !r->pages || !r->bytes)
        result = delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
    else if (fd < 0)
        result = delta_fail(err, errno == ENOENT ? DELTA_ENOTFOUND : DELTA_EIO, "%s: %s", path,
                            strerror(errno));
    else if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || !(r->f = fdopen(fd, "rb")))
        result = delta_fail(err, DELTA_EIO, "%s: not a regular file", path);
    else if (fread(&h, sizeof h, 1, r->f) != 1 || memcmp(h.magic, magic, sizeof magic) != 0)
        result = delta_fail(err, DELTA_EFORMAT, "%s: not a kept cache", path);
    else if (!e->has_cache || h.model != want.model || h.slot_bytes != want.slot_bytes ||
             h.page_bytes != want.page_bytes || h.page_tokens != want.page_tokens)
        result = delta_fail(err, DELTA_EFORMAT, "%s: of another model or backend", path);
    if (result < 0) {
        if (fd >= 0 && !r->f)
            (void)close(fd);
        delta_cache_close(r);
        return result;
    }
    r->n_left = h.n_records;
    *ret_r = r;
    return 0;
}

void delta_cache_close(delta_cache_reader *r)
{
    if (!r)
        return;
    if (r->f)
        (void)fclose(r->f);
    free(r->path);
    free(r->ids);
    free(r->pages);
    free(r->bytes);
    free(r);
}

static bool get(delta_cache_reader *r, uint64_t *h, void *to, size_t n)
{
    if (n && fread(to, n, 1, r->f) != 1)
        return false;
    *h = hash(*h, to, n);
    return true;
}

/* State and pages of a record into a slot and pages that were taken; 0 is `damaged`. */
static int fill(delta_cache_reader *r, uint64_t *h, uint32_t slot, const uint32_t *pages,
                uint32_t n, delta_error *err)
{
    delta_engine *e = r->e;
    if (!get(r, h, r->bytes, (size_t)e->prefix.slot_bytes))
        return 0;
    int result = de_model_slot_load(e->model, slot, r->bytes, err);
    for (uint32_t i = 0; result == 0 && i < n; i++) {
        if (!get(r, h, r->bytes, (size_t)e->prefix.page_bytes))
            return 0;
        result = de_model_page_load(e->model, pages[i], r->bytes, err);
    }
    return result < 0 ? result : 1;
}

static int damaged(delta_cache_reader *r, delta_error *err)
{
    r->n_left = 0;
    return delta_fail(err, DELTA_EFORMAT, "%s: damaged", r->path);
}

int delta_cache_read(delta_cache_reader *r, delta_error *err)
{
    delta_engine *e = r->e;
    record x;
    uint64_t h = 0, sum;
    uint32_t slot;
    if (r->n_left == 0)
        return 0;
    if (!get(r, &h, &x, sizeof x))
        return damaged(r, err);
    if (x.end <= x.from)
        return damaged(r, err);
    r->n_left--;
    const uint32_t first = x.from / DE_PAGE, n = pages_of(x.from, x.end);
    const bool fits = x.end <= e->info.ctx_max;
    if (fits && !get(r, &h, r->ids + x.from, (x.end - x.from) * sizeof *r->ids))
        return damaged(r, err);
    /* Its parent may have gone meanwhile, and be nowhere for it to hang on. */
    const bool is_wanted = fits &&
                           (x.from == 0 || de_prefix_has(&e->prefix, x.owner, r->ids, x.from)) &&
                           !de_prefix_has(&e->prefix, x.owner, r->ids, x.end);
    if (!is_wanted) {
        const uint64_t rest =
            bytes_of(e, x.from, x.end) - sizeof x - (fits ? (x.end - x.from) * sizeof *r->ids : 0);
        return fseeko(r->f, (off_t)rest, SEEK_CUR) == 0 ? 1 : damaged(r, err);
    }
    if (de_gdn_slots_take(&e->slots, &slot, NULL) < 0) {
        r->n_left = 0; /* what comes later is needed less than what is there */
        return 0;
    }
    if (de_kv_pages_take(&e->kv, n, r->pages + first, NULL) < 0) {
        de_gdn_slots_give(&e->slots, slot);
        r->n_left = 0;
        return 0;
    }
    int result = fill(r, &h, slot, r->pages + first, n, err);
    const uint64_t want = h;
    if (result == 0 || (result > 0 && (!get(r, &h, &sum, sizeof sum) || sum != want)))
        result = damaged(r, err);
    if (result < 0 || !de_prefix_add(&e->prefix, x.owner, r->ids, x.end, r->pages, slot))
        de_gdn_slots_give(&e->slots, slot);
    de_kv_pages_give(&e->kv, r->pages + first, n); /* the tree keeps them */
    return result < 0 ? result : 1;
}
