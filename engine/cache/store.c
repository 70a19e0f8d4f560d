/* store.c -- see store.h. */
#include "cache/store.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/bits.h"
#include "base/file.h"
#include "base/hash64.h"

enum { BUCKETS = 4096, NAME_BYTES = 32 };
#define ADOPTED (UINT64_C(1) << 63) /* numbers of adopted saves have this bit */
static const char suffix[] = ".state", torn_name[] = "write.new";

typedef struct entry entry;
struct entry {
    entry *next, *prev; /* of all, in order of id */
    entry *in_bucket, *in_id_bucket;
    entry *parent;
    de_record record; /* tokens and sums are its own */
    uint64_t id;      /* the record's, or of ADOPTED */
    char *path;       /* of an adopted one, or NULL */
    uint64_t base;    /* where the record begins in its file */
    uint64_t hash;    /* of the owner and the whole prefix */
    uint64_t bytes;   /* of the file */
    uint64_t used_ns; /* since 1970 */
    uint32_t n_children, refs;
    bool has_state, is_foreign;
};

/* A thread that does one thing at a time. */
typedef struct worker {
    pthread_t thread;
    pthread_mutex_t
        lock; /* guards is_posted and is_ended; who sees is_posted as it wants it owns the rest */
    pthread_cond_t changed;
    void (*run)(void *arg);
    void *arg;
    bool is_posted, is_ended, has_thread;
} worker;

/* Reads a piece of a record. */
typedef struct reader {
    worker worker;
    const de_store *st;
    const entry *of;
    uint32_t page, n; /* absolute; n == 0: the state */
    uint8_t *buffer;
    delta_error err;
} reader;

typedef struct removal {
    struct removal *next;
    uint64_t id, keep_bytes; /* keep_bytes 0: the whole file */
} removal;

struct de_store {
    de_store_options o;
    char *folder;
    entry *first, *last;
    entry *buckets[BUCKETS], *id_buckets[BUCKETS];
    uint64_t bytes, last_id, last_adopted;
    uint32_t n_adopted;
    de_store_stats stats;

    worker writer;
    struct {
        bool is_on;
        de_record r; /* tokens and sums are its own */
        entry *parent;
        uint32_t at, n;    /* the piece: n pages from `at` of the record on; n == 0: the state */
        char *path, *torn; /* the file, and while it is written */
        const void *text;  /* of a save, before the record */
        size_t text_bytes;
        bool is_save;
        uint64_t base; /* where the record begins */
        int fd;
        removal *removals;         /* what makes room */
        enum de_store_phase phase; /* what follows when the writer rests */
        delta_error err;
    } w;
    struct {
        bool is_on;
        entry *leaf, *of;           /* of: whose pages come next */
        uint32_t first_page, until; /* absolute: [first_page, until) are to come */
        uint64_t n_begun, n_taken;  /* pieces; the k-th is with reader k % DE_STORE_READERS */
        reader by[DE_STORE_READERS];
    } r;
};

size_t de_store_buffer_bytes(const de_record_kind *k)
{
    uint64_t n = k->slot_bytes > k->page_bytes ? k->slot_bytes : k->page_bytes;
    return (size_t)(n > DE_STORE_PIECE ? n : DE_STORE_PIECE);
}

static uint32_t piece_pages(const de_store *st)
{
    const uint64_t page = st->o.kind.page_bytes, n = page ? DE_STORE_PIECE / page : 1;
    return n ? (uint32_t)n : 1;
}

/* ---- files */

static uint64_t now_ns(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static char *path_of(const de_store *st, uint64_t id)
{
    char name[NAME_BYTES];
    (void)snprintf(name, sizeof name, "%016" PRIx64 "%s", id, suffix);
    return de_path_join(st->folder, name);
}

static int failed(const char *path, const char *what, delta_error *err)
{
    const bool full = errno == ENOSPC || errno == EDQUOT || errno == EFBIG;
    return delta_fail(err, full ? DELTA_ELIMIT : DELTA_EIO, "%s: %s: %s", path, what,
                      strerror(errno));
}

static bool write_at(int fd, const void *bytes, uint64_t n, uint64_t at)
{
    const uint8_t *p = bytes;
    while (n) {
        const ssize_t k = pwrite(fd, p, n, (off_t)at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        p += k, at += (uint64_t)k, n -= (uint64_t)k;
    }
    return true;
}

/* false with errno 0: the file ends before. */
static bool read_at(int fd, void *bytes, uint64_t n, uint64_t at)
{
    uint8_t *p = bytes;
    while (n) {
        const ssize_t k = pread(fd, p, n, (off_t)at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0) {
            errno = k ? errno : 0;
            return false;
        }
        p += k, at += (uint64_t)k, n -= (uint64_t)k;
    }
    return true;
}

static void remove_file(const de_store *st, uint64_t id, uint64_t keep_bytes)
{
    char *path = path_of(st, id);
    if (path && keep_bytes)
        (void)!truncate(path, (off_t)keep_bytes);
    else if (path)
        (void)unlink(path);
    free(path);
}

/* ---- the index */

static uint64_t add_token(uint64_t h, uint32_t id)
{
    h = (h ^ id) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 29;
}

static uint64_t owner_hash(uint64_t owner)
{
    return de_hash64(1, &owner, sizeof owner);
}

static bool is_prefix(const entry *x, const uint32_t *ids)
{
    for (; x; x = x->parent)
        if (memcmp(x->record.tokens, ids + x->record.head.from,
                   (x->record.head.end - x->record.head.from) * sizeof *ids) != 0)
            return false;
    return true;
}

/* Does f for each record of a prefix of ids [n]. */
static void each_prefix(const de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n,
                        void (*f)(void *arg, entry *x), void *arg)
{
    uint64_t h = owner_hash(owner);
    for (uint32_t i = 0; i < n; i++) {
        h = add_token(h, ids[i]);
        for (entry *x = st->buckets[h % BUCKETS]; x; x = x->in_bucket)
            if (x->hash == h && x->record.head.end == i + 1 && x->record.head.owner == owner &&
                !x->is_foreign && is_prefix(x, ids))
                f(arg, x);
    }
}

static entry *by_id(const de_store *st, uint64_t id)
{
    entry *x = st->id_buckets[id % BUCKETS];
    while (x && x->id != id)
        x = x->in_id_bucket;
    return x;
}

/* Behind all others: its id is the largest. */
static void link_entry(de_store *st, entry *x)
{
    x->hash = x->parent ? x->parent->hash : owner_hash(x->record.head.owner);
    for (uint32_t i = 0; i < x->record.head.end - x->record.head.from; i++)
        x->hash = add_token(x->hash, x->record.tokens[i]);
    x->in_bucket = st->buckets[x->hash % BUCKETS];
    st->buckets[x->hash % BUCKETS] = x;
    x->in_id_bucket = st->id_buckets[x->id % BUCKETS];
    st->id_buckets[x->id % BUCKETS] = x;
    x->prev = st->last;
    if (st->last)
        st->last->next = x;
    else
        st->first = x;
    st->last = x;
    if (x->parent)
        x->parent->n_children++;
    if (x->path) {
        st->n_adopted++;
        return;
    }
    st->bytes += x->bytes;
    st->last_id = x->id;
    *(x->is_foreign ? &st->stats.foreign : &st->stats.records) += 1;
}

static void free_entry(entry *x)
{
    free((void *)(uintptr_t)x->record.tokens);
    free((void *)(uintptr_t)x->record.sums);
    free(x->path);
    free(x);
}

static void unlink_entry(de_store *st, entry *x)
{
    entry **p = &st->buckets[x->hash % BUCKETS];
    while (*p != x)
        p = &(*p)->in_bucket;
    *p = x->in_bucket;
    for (p = &st->id_buckets[x->id % BUCKETS]; *p != x;)
        p = &(*p)->in_id_bucket;
    *p = x->in_id_bucket;
    if (x->prev)
        x->prev->next = x->next;
    else
        st->first = x->next;
    if (x->next)
        x->next->prev = x->prev;
    else
        st->last = x->prev;
    if (x->parent)
        x->parent->n_children--;
    if (x->path) {
        st->n_adopted--;
    } else {
        st->bytes -= x->bytes;
        *(x->is_foreign ? &st->stats.foreign : &st->stats.records) -= 1;
    }
    free_entry(x);
}

/* Removes it now, with all that hangs on it; children come later in the list. false: somebody reads it or
 * writes behind it; its state is nobody's any more. */
static bool discard(de_store *st, entry *x)
{
    for (entry *c = x->next; c;) {
        entry *next = c->next;
        if (c->parent == x && discard(st, c))
            next = x->next; /* it and what hung on it are gone, wherever they stood */
        c = next;
    }
    x->has_state = false;
    if (x->n_children || x->refs)
        return false;
    if (!x->path)
        remove_file(st, x->id, 0);
    unlink_entry(st, x);
    return true;
}

static void keep_longest(void *arg, entry *x)
{
    entry **best = arg;
    if (x->has_state)
        *best = x; /* they come by length */
}

uint32_t de_store_find(const de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n,
                       uint32_t most, uint64_t *ret_id)
{
    entry *best = NULL;
    each_prefix(st, owner, ids, n < most ? n : most, keep_longest, &best);
    if (best)
        *ret_id = best->id;
    return best ? best->record.head.end : 0;
}

struct exact {
    uint32_t n;
    uint64_t id;
};
static void keep_exact(void *arg, entry *x)
{
    struct exact *e = arg;
    if (x->record.head.end == e->n && x->has_state && !x->path)
        e->id = x->id;
}

uint64_t de_store_record(const de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n)
{
    struct exact e = { .n = n };
    each_prefix(st, owner, ids, n, keep_exact, &e);
    return e.id;
}

bool de_store_touch(de_store *st, uint64_t id)
{
    entry *x = by_id(st, id);
    if (!x || !x->has_state)
        return false;
    const uint64_t now = now_ns();
    if (now < x->used_ns + DE_STORE_TOUCH_S * UINT64_C(1000000000))
        return true;
    x->used_ns = now;
    if (x->path)
        return true;
    char *path = path_of(st, id);
    if (path)
        (void)utimensat(AT_FDCWD, path, NULL, 0);
    free(path);
    return true;
}

struct longer {
    uint32_t from;
    uint64_t id;
};
static void find_longer(void *arg, entry *x)
{
    struct longer *l = arg;
    if (x->record.head.end > l->from && !l->id && x->has_state)
        l->id = x->id;
}

void de_store_forget(de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n, uint32_t from)
{
    for (;;) {
        struct longer l = { .from = from };
        each_prefix(st, owner, ids, n, find_longer, &l);
        if (!l.id)
            return;
        (void)discard(st, by_id(st, l.id));
    }
}

/* The one to give up next: of another kind, then what was used longest ago. */
static entry *least(const de_store *st)
{
    entry *found = NULL;
    for (entry *x = st->first; x; x = x->next) {
        if (x->refs || x->path || (x->n_children && x->bytes == x->record.state_at))
            continue;
        if (!found ||
            (x->is_foreign != found->is_foreign ? x->is_foreign : x->used_ns < found->used_ns))
            found = x;
    }
    return found;
}

/* false: no memory. */
static bool give_up(de_store *st, entry *x, removal **list)
{
    removal *m = malloc(sizeof *m);
    if (!m)
        return false;
    *m = (removal){ .id = x->id };
    while (*list)
        list = &(*list)->next;
    *list = m; /* children before their parents, whenever somebody is killed */
    st->stats.evictions++;
    if (x->n_children) {
        m->keep_bytes = x->record.state_at;
        st->bytes -= x->bytes - x->record.state_at;
        x->bytes = x->record.state_at;
        x->has_state = false;
    } else {
        unlink_entry(st, x);
    }
    return true;
}

static void run_removals(const de_store *st, removal **list)
{
    for (removal *m = *list, *next; m; m = next) {
        next = m->next;
        remove_file(st, m->id, m->keep_bytes);
        free(m);
    }
    *list = NULL;
}

/* ---- workers */

static void *worker_main(void *arg)
{
    worker *w = arg;
    (void)pthread_mutex_lock(&w->lock);
    for (;;) {
        while (!w->is_posted && !w->is_ended)
            (void)pthread_cond_wait(&w->changed, &w->lock);
        if (!w->is_posted)
            break;
        (void)pthread_mutex_unlock(&w->lock);
        w->run(w->arg);
        (void)pthread_mutex_lock(&w->lock);
        w->is_posted = false;
        (void)pthread_cond_broadcast(&w->changed);
    }
    (void)pthread_mutex_unlock(&w->lock);
    return NULL;
}

static int worker_start(worker *w, void (*run)(void *arg), void *arg, delta_error *err)
{
    *w = (worker){ .run = run, .arg = arg };
    if (pthread_mutex_init(&w->lock, NULL) != 0 || pthread_cond_init(&w->changed, NULL) != 0 ||
        pthread_create(&w->thread, NULL, worker_main, w) != 0)
        return delta_fail(err, DELTA_ENOMEM, "threads of the cache on disk");
    w->has_thread = true;
    return 0;
}

static void worker_post(worker *w)
{
    (void)pthread_mutex_lock(&w->lock);
    assert(!w->is_posted);
    w->is_posted = true;
    (void)pthread_cond_broadcast(&w->changed);
    (void)pthread_mutex_unlock(&w->lock);
}

static bool worker_rests(worker *w, bool wait)
{
    (void)pthread_mutex_lock(&w->lock);
    while (wait && w->is_posted)
        (void)pthread_cond_wait(&w->changed, &w->lock);
    const bool rests = !w->is_posted;
    (void)pthread_mutex_unlock(&w->lock);
    return rests;
}

static void worker_end(worker *w)
{
    if (!w->has_thread)
        return;
    (void)pthread_mutex_lock(&w->lock);
    w->is_ended = true;
    (void)pthread_cond_broadcast(&w->changed);
    (void)pthread_mutex_unlock(&w->lock);
    (void)pthread_join(w->thread, NULL);
    (void)pthread_mutex_destroy(&w->lock);
    (void)pthread_cond_destroy(&w->changed);
    w->has_thread = false;
}

/* ---- writing */

static void keep_parent(void *arg, entry *x)
{
    if (!x->path)
        *(entry **)arg = x;
}

/* The least useful records leave until there is room for bytes more. */
static int make_room(de_store *st, uint64_t bytes, removal **list)
{
    if (bytes > st->o.max_bytes)
        return DELTA_ELIMIT;
    while (st->bytes + bytes > st->o.max_bytes) {
        entry *x = least(st);
        if (!x)
            return DELTA_ELIMIT;
        if (!give_up(st, x, list))
            return DELTA_ENOMEM;
    }
    return 0;
}

static void write_free(de_store *st)
{
    run_removals(st, &st->w.removals);
    free((void *)(uintptr_t)st->w.r.tokens);
    free((void *)(uintptr_t)st->w.r.sums);
    free(st->w.path);
    free(st->w.torn);
    st->w.r.tokens = NULL;
    st->w.r.sums = NULL;
    st->w.path = st->w.torn = NULL;
    st->w.is_on = false;
}

int de_store_write_begin(de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n,
                         const de_store_save *save, uint32_t *ret_first, uint64_t *ret_bytes,
                         delta_error *err)
{
    assert(!st->w.is_on && n);
    entry *parent = NULL;
    if (!save)
        each_prefix(st, owner, ids, n - 1, keep_parent, &parent);
    de_record r = { .head = { .kind = st->o.kind, .owner = owner, .end = n } };
    r.head.id = save ? 1 : st->last_id + 1;
    r.head.parent = parent ? parent->id : 0;
    r.head.from = parent ? parent->record.head.end : 0;
    if (!de_record_layout(&r))
        return delta_fail(err, DELTA_ELIMIT, "%u tokens are too many for a record", n);
    const uint64_t base = save ? de_align_up(save->text_bytes, DE_RECORD_ALIGN) : 0,
                   bytes = base + r.whole_bytes;
    memset(&st->w, 0, sizeof st->w);
    st->w.fd = -1;
    if (parent)
        parent->n_children++; /* it may lose its state to make room, but not go */
    int result = 0;
    if (!save)
        result = make_room(st, bytes, &st->w.removals);
    else if (bytes > save->max_bytes)
        result = DELTA_ELIMIT;
    if (result < 0) {
        if (parent)
            parent->n_children--;
        write_free(st);
        return delta_fail(err, result, "a state of %u tokens needs %llu bytes of %llu", n,
                          (unsigned long long)bytes,
                          (unsigned long long)(save ? save->max_bytes : st->o.max_bytes));
    }
    uint32_t *tokens = malloc((n - r.head.from) * sizeof *tokens);
    st->w.r = r;
    st->w.r.tokens = tokens;
    st->w.r.sums = calloc(r.n_pages + 1, sizeof *r.sums);
    st->w.path = save ? strdup(save->path) : path_of(st, r.head.id);
    st->w.torn = de_path_join(st->folder, torn_name);
    if (save && st->w.path) {
        free(st->w.torn);
        st->w.torn = malloc(strlen(save->path) + sizeof ".new");
        if (st->w.torn)
            (void)sprintf(st->w.torn, "%s.new", save->path);
    }
    if (!tokens || !st->w.r.sums || !st->w.path || !st->w.torn) {
        if (parent)
            parent->n_children--;
        write_free(st);
        return delta_fail(err, DELTA_ENOMEM, "record of %u tokens", n);
    }
    memcpy(tokens, ids + r.head.from, (n - r.head.from) * sizeof *tokens);
    st->w.is_on = true;
    st->w.is_save = save != NULL;
    st->w.text = save ? save->text : NULL;
    st->w.text_bytes = save ? save->text_bytes : 0;
    st->w.base = base;
    st->w.parent = parent;
    st->w.n = r.n_pages < piece_pages(st) ? r.n_pages : piece_pages(st);
    st->w.phase = DE_STORE_YOURS;
    *ret_first = r.first_page;
    *ret_bytes = bytes;
    return 0;
}

enum de_store_phase de_store_write_phase(de_store *st)
{
    if (!st->w.is_on)
        return DE_STORE_NONE;
    return worker_rests(&st->writer, false) ? st->w.phase : DE_STORE_BUSY;
}

void de_store_write_wants(const de_store *st, uint32_t *ret_page, uint32_t *ret_n)
{
    *ret_page = st->w.r.first_page + st->w.at;
    *ret_n = st->w.n;
}

void de_store_write_put(de_store *st)
{
    worker_post(&st->writer);
}

static int sync_folder(const char *path, delta_error *err)
{
    char *folder = strdup(path), *slash = folder ? strrchr(folder, '/') : NULL;
    int fd = -1, r = 0;
    if (slash)
        slash[slash == folder] = 0;
    if (!folder)
        r = delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
    else if ((fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0 ||
             fsync(fd) < 0)
        r = failed(path, "its folder", err);
    if (fd >= 0)
        (void)close(fd);
    free(folder);
    return r;
}

/* The file is whole: its name. */
static int publish(de_store *st, delta_error *err)
{
    const size_t n = de_record_meta_bytes(&st->w.r);
    uint8_t *meta = malloc(n);
    if (!meta)
        return delta_fail(err, DELTA_ENOMEM, "%s: no memory", st->w.torn);
    de_record_write(&st->w.r, meta);
    int r = 0;
    if (!write_at(st->w.fd, meta, n, st->w.base) ||
        (st->w.text_bytes && !write_at(st->w.fd, st->w.text, st->w.text_bytes, 0)) ||
        fsync(st->w.fd) < 0)
        r = failed(st->w.torn, "writing", err);
    free(meta);
    if (r == 0 && rename(st->w.torn, st->w.path) < 0)
        r = failed(st->w.path, "cannot be named", err);
    return r < 0 ? r : sync_folder(st->w.path, err);
}

static int write_piece(de_store *st, delta_error *err)
{
    de_record *r = &st->w.r;
    const bool is_state = st->w.n == 0;
    uint64_t *sums = (uint64_t *)(uintptr_t)r->sums;
    if (st->w.fd < 0) {
        run_removals(st, &st->w.removals);
        st->w.fd = open(st->w.torn, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (st->w.fd < 0)
            return failed(st->w.torn, "cannot be written", err);
    }
    const uint64_t each = is_state ? r->head.kind.slot_bytes : r->head.kind.page_bytes;
    const uint32_t n = is_state ? 1 : st->w.n;
    for (uint32_t i = 0; i < n; i++)
        sums[st->w.at + i] =
            de_record_sum(&r->head, st->w.at + i, st->o.write_buffer + i * each, (size_t)each);
    if (!write_at(st->w.fd, st->o.write_buffer, n * each,
                  st->w.base + r->pages_at + st->w.at * r->head.kind.page_bytes))
        return failed(st->w.torn, "writing", err);
    if (is_state)
        return publish(st, err);
    st->w.at += n;
    const uint32_t left = r->n_pages - st->w.at;
    st->w.n = left < piece_pages(st) ? left : piece_pages(st);
    return 0;
}

static void run_writer(void *arg)
{
    de_store *st = arg;
    const bool is_last = st->w.n == 0;
    const int r = write_piece(st, &st->w.err);
    st->w.phase = r < 0 ? DE_STORE_FAILED : is_last ? DE_STORE_DONE : DE_STORE_YOURS;
    if ((r < 0 || is_last) && st->w.fd >= 0) {
        (void)close(st->w.fd);
        st->w.fd = -1;
    }
    if (r < 0)
        (void)unlink(st->w.torn); /* a full disk has use for the room */
}

int de_store_write_end(de_store *st, uint64_t *ret_id, delta_error *err)
{
    if (!st->w.is_on)
        return delta_fail(err, DELTA_ESTATE, "nothing is written");
    (void)worker_rests(&st->writer, true);
    int r = 0;
    if (st->w.phase == DE_STORE_FAILED) {
        r = st->w.err.code;
        if (err)
            *err = st->w.err;
    } else if (st->w.phase != DE_STORE_DONE) {
        r = delta_fail(err, DELTA_ECANCELLED, "given up");
        if (st->w.fd >= 0) {
            (void)unlink(st->w.torn);
            (void)close(st->w.fd);
        }
    }
    if (st->w.parent)
        st->w.parent->n_children--;
    uint64_t id = 0;
    if (r == 0 && !st->w.is_save) {
        entry *x = calloc(1, sizeof *x);
        if (x) {
            id = st->w.r.head.id;
            x->record = st->w.r;
            x->id = id;
            x->parent = st->w.parent;
            x->bytes = x->record.whole_bytes;
            x->used_ns = now_ns();
            x->has_state = true;
            link_entry(st, x);
            st->stats.writes++;
            st->w.r.tokens = NULL; /* its own now */
            st->w.r.sums = NULL;
        } else {
            (void)unlink(st->w.path);
            r = delta_fail(err, DELTA_ENOMEM, "record");
        }
    }
    write_free(st);
    if (r == 0)
        *ret_id = id;
    return r;
}

/* ---- reading */

static void hold_chain(entry *x, bool hold)
{
    for (; x; x = x->parent)
        x->refs += hold ? 1u : -1u;
}

static int read_piece(const reader *p, const char *path, delta_error *err)
{
    const de_record *x = &p->of->record;
    const bool is_state = p->n == 0;
    const uint64_t each = is_state ? x->head.kind.slot_bytes : x->head.kind.page_bytes;
    const uint32_t first = is_state ? x->n_pages : p->page - x->first_page, n = is_state ? 1 : p->n;
    const uint64_t at = p->of->base + x->pages_at + first * x->head.kind.page_bytes;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    int r = 0;
    if (fd < 0 || !read_at(fd, p->buffer, n * each, at))
        r = delta_fail(err, errno ? DELTA_EIO : DELTA_EFORMAT, "%s: at offset %llu: %s", path,
                       (unsigned long long)at, errno ? strerror(errno) : "the file ends");
    for (uint32_t i = 0; r == 0 && i < n; i++)
        if (de_record_sum(&x->head, first + i, p->buffer + i * each, (size_t)each) !=
            x->sums[first + i])
            r = delta_fail(err, DELTA_EFORMAT, "%s: damaged at offset %llu", path,
                           (unsigned long long)(at + i * each));
    if (fd >= 0)
        (void)close(fd);
    return r;
}

static void run_reader(void *arg)
{
    reader *p = arg;
    char *path = p->of->path ? strdup(p->of->path) : path_of(p->st, p->of->id);
    p->err.code = path ? read_piece(p, path, &p->err)
                       : delta_fail(&p->err, DELTA_ENOMEM, "%s: no memory", p->st->folder);
    free(path);
}

static reader *reader_of(de_store *st, uint64_t piece)
{
    return &st->r.by[piece % DE_STORE_READERS];
}

/* The state first, then the pages from the end of the chain to its beginning. false: all have begun. */
static bool begin_piece(de_store *st)
{
    reader *p = reader_of(st, st->r.n_begun);
    uint32_t n = 0;
    while (st->r.n_begun && st->r.until > st->r.first_page &&
           st->r.of->record.first_page >= st->r.until)
        st->r.of = st->r.of->parent;
    if (st->r.n_begun) {
        if (st->r.until <= st->r.first_page)
            return false;
        uint32_t from = st->r.of->record.first_page;
        from = from > st->r.first_page ? from : st->r.first_page;
        n = st->r.until - from < piece_pages(st) ? st->r.until - from : piece_pages(st);
        st->r.until -= n;
    }
    p->of = st->r.of;
    p->page = st->r.until;
    p->n = n;
    p->err = (delta_error){ 0 };
    st->r.n_begun++;
    worker_post(&p->worker);
    return true;
}

int de_store_read_begin(de_store *st, uint64_t id, uint32_t first_page, delta_error *err)
{
    assert(!st->r.is_on);
    entry *x = by_id(st, id);
    if (!x || !x->has_state)
        return delta_fail(err, DELTA_ENOTFOUND, "record %llu is gone", (unsigned long long)id);
    hold_chain(x, true);
    st->r.is_on = true;
    st->r.leaf = st->r.of = x;
    st->r.first_page = first_page;
    st->r.until = x->record.first_page + x->record.n_pages;
    st->r.n_begun = st->r.n_taken = 0;
    while (st->r.n_begun < DE_STORE_READERS && begin_piece(st))
        ;
    return 0;
}

enum de_store_phase de_store_read_phase(de_store *st)
{
    reader *p = reader_of(st, st->r.n_taken);
    if (!st->r.is_on)
        return DE_STORE_NONE;
    if (st->r.n_taken == st->r.n_begun)
        return DE_STORE_DONE;
    if (!worker_rests(&p->worker, false))
        return DE_STORE_BUSY;
    return p->err.code < 0 ? DE_STORE_FAILED : DE_STORE_YOURS;
}

const uint8_t *de_store_read_has(const de_store *st, uint32_t *ret_page, uint32_t *ret_n)
{
    const reader *p = &st->r.by[st->r.n_taken % DE_STORE_READERS];
    *ret_page = p->page;
    *ret_n = p->n;
    return p->buffer;
}

void de_store_read_next(de_store *st)
{
    st->r.n_taken++;
    (void)begin_piece(st); /* into the buffer that is free now */
}

int de_store_read_end(de_store *st, delta_error *err)
{
    if (!st->r.is_on)
        return delta_fail(err, DELTA_ESTATE, "nothing is read");
    for (int i = 0; i < DE_STORE_READERS; i++)
        (void)worker_rests(&st->r.by[i].worker, true);
    const enum de_store_phase phase = de_store_read_phase(st);
    const reader *p = reader_of(st, st->r.n_taken);
    hold_chain(st->r.leaf, false);
    st->r.is_on = false;
    if (phase == DE_STORE_DONE) {
        st->stats.reads++;
        (void)de_store_touch(st, st->r.leaf->id);
        return 0;
    }
    if (phase != DE_STORE_FAILED)
        return delta_fail(err, DELTA_ECANCELLED, "given up");
    if (err)
        *err = p->err;
    if (p->err.code == DELTA_EFORMAT || p->err.code == DELTA_EIO)
        (void)discard(st, by_id(st, p->of->id));
    return p->err.code;
}

/* ---- opening */

/* Opens a file and reads the head of the record at `at`; *ret_meta [malloc'ed] is what *ret_r points to.
 * The descriptor, or < 0. */
static int open_record(const char *path, uint64_t at, de_record *ret_r, uint8_t **ret_meta,
                       uint64_t *ret_size, delta_error *err)
{
    struct stat file;
    uint8_t *meta = NULL;
    int64_t need = (int64_t)sizeof ret_r->head;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return delta_fail(err, errno == ENOENT ? DELTA_ENOTFOUND : DELTA_EIO, "%s: %s", path,
                          strerror(errno));
    int r = 0;
    if (fstat(fd, &file) < 0 || !S_ISREG(file.st_mode))
        r = delta_fail(err, DELTA_EIO, "%s: not a regular file", path);
    const uint64_t size = r == 0 && (uint64_t)file.st_size > at ? (uint64_t)file.st_size - at : 0;
    while (r == 0 && need > 0) {
        free(meta);
        meta = NULL;
        if ((uint64_t)need > size)
            r = delta_fail(err, DELTA_EFORMAT, "%s: damaged: it ends at offset %llu", path,
                           (unsigned long long)(at + size));
        else if (!(meta = malloc((size_t)need)))
            r = delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
        else if (!read_at(fd, meta, (uint64_t)need, at))
            r = delta_fail(err, DELTA_EIO, "%s: cannot be read", path);
        else if ((need = de_record_parse(meta, (size_t)need, ret_r, err)) < 0) {
            r = (int)need;
            delta_error_prefix(err, "%s, from offset %llu on", path, (unsigned long long)at);
        }
    }
    if (r < 0) {
        free(meta);
        (void)close(fd);
        return r;
    }
    *ret_meta = meta;
    *ret_size = size;
    return fd;
}

/* An entry of r, without links; NULL: no memory. */
static entry *new_entry(const de_store *st, const de_record *r)
{
    const size_t n_tokens = (r->head.end - r->head.from) * sizeof *r->tokens,
                 n_sums = (r->n_pages + 1) * sizeof *r->sums;
    entry *x = calloc(1, sizeof *x);
    uint32_t *tokens = malloc(n_tokens);
    uint64_t *sums = malloc(n_sums);
    if (!x || !tokens || !sums) {
        free(x);
        free(tokens);
        free(sums);
        return NULL;
    }
    memcpy(tokens, r->tokens, n_tokens);
    memcpy(sums, r->sums, n_sums);
    x->record = *r;
    x->record.tokens = tokens;
    x->record.sums = sums;
    x->id = r->head.id;
    x->is_foreign = memcmp(&r->head.kind, &st->o.kind, sizeof r->head.kind) != 0;
    return x;
}

/* The record in a file of the store's; NULL and err: none. */
static entry *read_entry(de_store *st, const char *path, uint64_t id, delta_error *err)
{
    uint8_t *meta;
    uint64_t size;
    struct stat file = { 0 };
    de_record r;
    const int fd = open_record(path, 0, &r, &meta, &size, err);
    if (fd < 0)
        return NULL;
    entry *x = NULL;
    if (r.head.id != id || r.head.id >= ADOPTED || (size != r.whole_bytes && size != r.state_at))
        (void)delta_fail(err, DELTA_EFORMAT, "%s: %llu bytes, not %llu", path,
                         (unsigned long long)size, (unsigned long long)r.whole_bytes);
    else if (!(x = new_entry(st, &r)))
        (void)delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
    if (x) {
        (void)fstat(fd, &file);
        x->bytes = size;
        x->has_state = size == r.whole_bytes;
        x->used_ns = (uint64_t)file.st_mtim.tv_sec * 1000000000u + (uint64_t)file.st_mtim.tv_nsec;
    }
    free(meta);
    (void)close(fd);
    return x;
}

static int by_id_order(const void *a, const void *b)
{
    const entry *x = *(entry *const *)a, *y = *(entry *const *)b;
    return x->record.head.id < y->record.head.id ? -1 : x->record.head.id > y->record.head.id;
}

/* Its parent, which comes before it, into x; false: there is none that fits. */
static bool find_parent(const de_store *st, entry *x)
{
    const de_record_head *h = &x->record.head;
    if (h->parent == 0)
        return true;
    x->parent = by_id(st, h->parent);
    return x->parent && x->parent->record.head.end == h->from &&
           x->parent->record.head.owner == h->owner &&
           memcmp(&x->parent->record.head.kind, &h->kind, sizeof h->kind) == 0;
}

static int scan(de_store *st, de_store_found *found, delta_error *err)
{
    DIR *d = opendir(st->folder);
    if (!d)
        return failed(st->folder, "cannot be read", err);
    entry **all = NULL;
    size_t n = 0, cap = 0;
    int r = 0;
    for (struct dirent *f; r == 0 && (f = readdir(d));) {
        uint64_t id = 0;
        int end = 0;
        if (strcmp(f->d_name, torn_name) == 0) {
            char *torn = de_path_join(st->folder, torn_name);
            found->torn += torn && unlink(torn) == 0;
            free(torn);
            continue;
        }
        if (sscanf(f->d_name, "%16" SCNx64 ".state%n", &id, &end) != 1 || id == 0 ||
            end != 16 + (int)sizeof suffix - 1 || f->d_name[end])
            continue; /* not the store's */
        if (n == cap) {
            entry **more = realloc(all, (cap = cap * 2 + 64) * sizeof *all);
            if (!more) {
                r = delta_fail(err, DELTA_ENOMEM, "%s: no memory", st->folder);
                break;
            }
            all = more;
        }
        delta_error why = { 0 };
        char *path = de_path_join(st->folder, f->d_name);
        all[n] = path ? read_entry(st, path, id, &why) : NULL;
        if (all[n]) {
            n++;
        } else if (path && why.code != DELTA_ENOMEM) {
            found->damaged++;
            (void)snprintf(found->text, sizeof found->text, "%s", why.text);
            (void)unlink(path);
        }
        free(path);
    }
    (void)closedir(d);
    if (n)
        qsort(all, n, sizeof *all, by_id_order);
    for (size_t i = 0; i < n; i++) {
        if (r == 0 && find_parent(st, all[i])) {
            link_entry(st, all[i]);
            continue;
        }
        if (r == 0) {
            found->damaged++;
            (void)snprintf(found->text, sizeof found->text,
                           "%s/%016" PRIx64 "%s: its parent is gone", st->folder,
                           all[i]->record.head.id, suffix);
            remove_file(st, all[i]->record.head.id, 0);
        }
        free_entry(all[i]);
    }
    free(all);
    /* The limit may be lower than it was. */
    removal *removals = NULL;
    for (entry *x; st->bytes > st->o.max_bytes && (x = least(st)) && give_up(st, x, &removals);)
        ;
    run_removals(st, &removals);
    return r;
}

/* ---- saves */

/* A save is of `kind` and as long as it says. */
static int check_save(const de_record_kind *kind, const char *path, const de_record *r, uint64_t at,
                      uint64_t size, delta_error *err)
{
    if (memcmp(&r->head.kind, kind, sizeof *kind) != 0)
        return delta_fail(err, DELTA_ESTATE,
                          "%s is of %s (%016" PRIx64 "), this is %s (%016" PRIx64 ")", path,
                          r->head.kind.name, r->head.kind.model, kind->name, kind->model);
    if (size != r->whole_bytes || r->head.from != 0)
        return delta_fail(err, DELTA_EFORMAT, "%s: damaged: it ends at offset %llu, not %llu", path,
                          (unsigned long long)(at + size),
                          (unsigned long long)(at + r->whole_bytes));
    return 0;
}

int de_store_check(const de_record_kind *kind, const char *path, uint64_t at, uint32_t *ret_tokens,
                   delta_error *err)
{
    uint8_t *meta, *bytes = NULL;
    uint64_t size;
    de_record r;
    const int fd = open_record(path, at, &r, &meta, &size, err);
    if (fd < 0)
        return fd;
    int result = check_save(kind, path, &r, at, size, err);
    const uint64_t slot = kind->slot_bytes, page = kind->page_bytes;
    if (result == 0 && !(bytes = malloc((size_t)(slot > page ? slot : page) + 1)))
        result = delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
    for (uint32_t i = 0; result == 0 && i <= r.n_pages; i++) {
        const uint64_t n = i < r.n_pages ? page : slot, from = at + r.pages_at + i * page;
        if (!read_at(fd, bytes, n, from))
            result = delta_fail(err, DELTA_EIO, "%s: cannot be read at offset %llu", path,
                                (unsigned long long)from);
        else if (de_record_sum(&r.head, i, bytes, (size_t)n) != r.sums[i])
            result = delta_fail(err, DELTA_EFORMAT, "%s: damaged at offset %llu", path,
                                (unsigned long long)from);
    }
    if (result == 0)
        *ret_tokens = r.head.end;
    free(bytes);
    free(meta);
    (void)close(fd);
    return result;
}

int de_store_adopt(de_store *st, const char *path, uint64_t at, uint64_t owner, delta_error *err)
{
    uint8_t *meta;
    uint64_t size;
    de_record r;
    const int fd = open_record(path, at, &r, &meta, &size, err);
    if (fd < 0)
        return fd;
    (void)close(fd);
    int result = check_save(&st->o.kind, path, &r, at, size, err);
    entry *x = result == 0 ? new_entry(st, &r) : NULL;
    free(meta);
    if (x && !(x->path = strdup(path))) {
        free_entry(x);
        x = NULL;
    }
    if (!x)
        return result < 0 ? result : delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
    for (entry *y = st->first, *next; y; y = next) { /* in the order in which they were adopted */
        next = y->next;
        if (y->path && ((strcmp(y->path, path) == 0 && y->record.head.owner == owner) ||
                        st->n_adopted >= DE_STORE_ADOPTED))
            (void)discard(st, y);
    }
    x->record.head.owner = owner;
    x->id = ADOPTED | ++st->last_adopted;
    x->base = at;
    x->has_state = true;
    link_entry(st, x);
    return 0;
}

int de_store_open(const de_store_options *o, de_store **ret_st, de_store_found *ret_found,
                  delta_error *err)
{
    *ret_found = (de_store_found){ 0 };
    de_store *st = calloc(1, sizeof *st);
    if (!st)
        return delta_fail(err, DELTA_ENOMEM, "%s: no memory", o->folder);
    st->o = *o;
    st->w.fd = -1;
    st->folder = strdup(o->folder);
    int r = 0;
    if (!st->folder)
        r = delta_fail(err, DELTA_ENOMEM, "%s: no memory", o->folder);
    else if (mkdir(st->folder, 0700) < 0 && errno != EEXIST)
        r = failed(st->folder, "cannot be made", err);
    if (r == 0)
        r = scan(st, ret_found, err);
    if (r == 0)
        r = worker_start(&st->writer, run_writer, st, err);
    for (int i = 0; r == 0 && i < DE_STORE_READERS; i++) {
        reader *p = &st->r.by[i];
        p->st = st;
        p->buffer = o->read_buffers + (size_t)i * de_store_buffer_bytes(&o->kind);
        r = worker_start(&p->worker, run_reader, p, err);
    }
    if (r < 0) {
        de_store_close(st);
        return r;
    }
    *ret_st = st;
    return 0;
}

void de_store_close(de_store *st)
{
    if (!st)
        return;
    worker_end(&st->writer);
    for (int i = 0; i < DE_STORE_READERS; i++)
        worker_end(&st->r.by[i].worker);
    if (st->w.is_on)
        (void)de_store_write_end(st, &(uint64_t){ 0 }, NULL); /* takes a torn file away */
    for (entry *x = st->first, *next; x; x = next) {
        next = x->next;
        free_entry(x);
    }
    free(st->folder);
    free(st);
}

void de_store_stats_get(const de_store *st, de_store_stats *ret_stats)
{
    *ret_stats = st->stats;
    ret_stats->bytes = st->bytes;
}
