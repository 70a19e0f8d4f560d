/* saves.c -- saves: a session's conversation and state as a file, to go on from later and as often as
 * one likes.
 *
 * DIR/saves/UID/NAME.save begins as the file of a kept session does (keep.c); at the next multiple of 4096
 * follows the state (engine/cache/store.h). The engine's writer writes it, whole or not at all. To
 * restore, a worker reads all of it; if every sum is right the conversation becomes a new session,
 * whose first turn finds the state as it would in the cache.
 *
 * A user is a uid on the Unix socket and sees its own saves only.
 *
 * Limits     limits.saved_bytes and DD_SAVES of a user; DD_SAVES_HELD calls at once, and of a user one
 *            that writes.
 * Threads    the loop, but read_save(). */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "daemon/live.h"

static const char suffix[] = ".save";

struct dd_save { /* a SaveSession or RestoreSession under way */
    dd_save *next;
    dd_service *s;
    dd_rpc *rpc; /* NULL: the call has ended */
    dd_peer peer;
    uint64_t id;
    char name[DD_SAVE_NAME + 1];
    char *path;
    char *text; /* the file's beginning, head and conversation */
    size_t len;
    const uint8_t *body; /* of it, the conversation [n_body] */
    size_t n_body;
    uv_work_t work;
    bool is_writing;
    const dd_timeline *timeline; /* that is saved */
    uint32_t n_tokens;
    int result;
    delta_error err;
};

/* DIR/saves, DIR/saves/UID or with a name the file; NULL: no memory. */
static char *path_of(const dd_service *s, const uint32_t *uid, const char *name)
{
    const char *dir = s->o.config->state.directory;
    const size_t size = strlen(dir) + DD_SAVE_NAME + 64;
    char *p = malloc(size);
    if (p && name)
        (void)snprintf(p, size, "%s/saves/%u/%s%s", dir, *uid, name, suffix);
    else if (p && uid)
        (void)snprintf(p, size, "%s/saves/%u", dir, *uid);
    else if (p)
        (void)snprintf(p, size, "%s/saves", dir);
    return p;
}

static int out_of_memory(dd_status *st)
{
    dd_status_set(st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the save");
    return -1;
}

static void refuse_unknown(dd_status *st, const char *name)
{
    dd_status_set(st, DD_NOT_FOUND, "SAVE_UNKNOWN", "there is no save of this name");
    st->missing = "deltad.v1.Save";
    (void)snprintf(st->missing_name, sizeof st->missing_name, "%s", name);
}

/* ---- a user's folder */

/* Calls f for each save, with its name. false: no memory. */
static bool each_save(const dd_service *s, uint32_t uid,
                      void (*f)(void *arg, const char *name, const struct stat *st), void *arg)
{
    char *folder = path_of(s, &uid, NULL);
    DIR *d = folder ? opendir(folder) : NULL;
    for (struct dirent *x; d && (x = readdir(d));) {
        struct stat st;
        char name[DD_SAVE_NAME + 1];
        const size_t len = strlen(x->d_name), tail = sizeof suffix - 1;
        if (len <= tail || len - tail > DD_SAVE_NAME ||
            strcmp(x->d_name + len - tail, suffix) != 0 ||
            fstatat(dirfd(d), x->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(st.st_mode))
            continue;
        memcpy(name, x->d_name, len - tail);
        name[len - tail] = 0;
        f(arg, name, &st);
    }
    if (d)
        (void)closedir(d);
    free(folder);
    return folder != NULL;
}

struct sum {
    const char *but; /* a name that does not count: it will be replaced */
    uint64_t bytes;
    uint32_t n;
};
static void add_save(void *arg, const char *name, const struct stat *st)
{
    struct sum *x = arg;
    if (strcmp(name, x->but) == 0)
        return;
    x->bytes += (uint64_t)st->st_size;
    x->n++;
}

static void put_save(dd_wire_out *o, const char *name, uint64_t bytes, uint64_t age_ns)
{
    size_t len = 0;
    uint8_t *p = dd_save_encode(name, bytes, age_ns, &len);
    if (p)
        dd_wire_put_bytes(o, 1, p, len);
    o->failed = o->failed || !p;
    free(p);
}

static void list_save(void *arg, const char *name, const struct stat *st)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_REALTIME, &now);
    const int64_t age =
        (now.tv_sec - st->st_mtim.tv_sec) * INT64_C(1000000000) + now.tv_nsec - st->st_mtim.tv_nsec;
    put_save(arg, name, (uint64_t)st->st_size, age > 0 ? (uint64_t)age : 0);
}

static void list(dd_service *s, dd_rpc *r)
{
    dd_wire_out o = { 0 };
    size_t len = 0;
    o.failed = !each_save(s, r->peer.uid, list_save, &o);
    uint8_t *msg = dd_wire_take(&o, &len);
    dd_answer(r, msg, len);
}

static void delete (dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st = { 0 };
    dd_wire_out o = { 0 };
    size_t len = 0;
    char *path = path_of(s, &r->peer.uid, q->name);
    if (!path)
        (void)out_of_memory(&st);
    else if (unlink(path) < 0 && errno == ENOENT)
        refuse_unknown(&st, q->name);
    else if (access(path, F_OK) == 0)
        dd_status_set(&st, DD_INTERNAL, "SAVE_FAILED", "%s cannot be removed", path);
    free(path);
    if (st.code) {
        dd_refuse(r, &st);
        return;
    }
    uint8_t *msg = dd_wire_take(&o, &len);
    dd_answer(r, msg, len);
}

/* ---- calls under way */

static void save_free(dd_save *v)
{
    for (dd_save **p = &v->s->saves; *p; p = &(*p)->next)
        if (*p == v) {
            *p = v->next;
            v->s->n_saves--;
            break;
        }
    free(v->path);
    free(v->text);
    free(v);
}

static bool is_being_saved(const dd_service *s, const dd_timeline *t)
{
    const dd_save *v = s->saves;
    while (v && v->timeline != t)
        v = v->next;
    return v != NULL;
}

static dd_save *save_new(dd_service *s, dd_rpc *r, const char *name, bool is_writing, dd_status *st)
{
    bool is_busy = s->n_saves >= DD_SAVES_HELD;
    for (const dd_save *v = s->saves; v && is_writing; v = v->next)
        is_busy |= v->is_writing && v->peer.uid == r->peer.uid;
    if (is_busy) {
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "QUEUE_FULL", "other saves are under way");
        st->retry_ms = DD_RETRY_MS;
        return NULL;
    }
    dd_save *v = calloc(1, sizeof *v);
    char *path = path_of(s, &r->peer.uid, name);
    if (!v || !path) {
        free(v);
        free(path);
        (void)out_of_memory(st);
        return NULL;
    }
    v->s = s;
    v->rpc = r;
    v->peer = r->peer;
    v->id = ++s->next_run;
    v->path = path;
    v->is_writing = is_writing;
    (void)snprintf(v->name, sizeof v->name, "%s", name);
    v->next = s->saves;
    s->saves = v;
    s->n_saves++;
    return v;
}

static void answer(dd_save *v, dd_wire_out *o, const dd_status *st)
{
    dd_rpc *r = v->rpc;
    size_t len = 0;
    v->rpc = NULL;
    if (r)
        r->handler = NULL;
    uint8_t *msg = dd_wire_take(o, &len);
    if (r && st->code)
        dd_refuse(r, st);
    else if (r)
        dd_answer(r, msg, len);
    if (!r || st->code)
        free(msg);
    save_free(v);
}

/* What the engine or a file says, in the words of the protocol. */
static void status_of(dd_status *st, const dd_save *v)
{
    const char *why = v->err.text;
    switch ((enum delta_code)v->result) {
    case DELTA_ENOTFOUND:
        if (!v->is_writing) {
            refuse_unknown(st, v->name);
            return;
        }
        dd_status_set(st, DD_FAILED_PRECONDITION, "NOT_COMPUTED",
                      "%s: take a turn, or append, first", why);
        return;
    case DELTA_ESTATE:
        dd_status_set(st, DD_FAILED_PRECONDITION, v->is_writing ? "NOT_SAVED" : "OTHER_MODEL", "%s",
                      why);
        return;
    case DELTA_EFORMAT:
        dd_status_set(st, DD_DATA_LOSS, "SAVE_DAMAGED", "%s", why);
        return;
    case DELTA_ELIMIT:
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "SAVE_LIMIT",
                      "%s: delete saves (deltactl saves delete NAME), or raise limits.saved_bytes",
                      why);
        return;
    case DELTA_ENOMEM:
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "%s", why);
        return;
    case DELTA_ECANCELLED:
        dd_status_set(st, DD_ABORTED, "NOT_SAVED", "%s", why);
        return;
    case DELTA_OK:
    case DELTA_EINVALID:
    case DELTA_EBUSY:
    case DELTA_EIO:
    case DELTA_EUNSUPPORTED:
    case DELTA_EDEVICE:
    case DELTA_EINTERNAL:
        break;
    }
    dd_status_set(st, DD_INTERNAL, "SAVE_FAILED", "%s", why);
}

void dd_saves_closed(dd_save *v)
{
    v->rpc->handler = NULL;
    v->rpc = NULL;
}

void dd_saves_abort(dd_service *s, const dd_status *st)
{
    for (dd_save *v = s->saves; v; v = v->next)
        if (v->rpc) {
            dd_rpc *r = v->rpc;
            dd_saves_closed(v);
            dd_refuse(r, st);
        }
}

/* ---- saving */

static int make_folders(const dd_service *s, uint32_t uid, dd_status *st)
{
    char *all = path_of(s, NULL, NULL), *own = path_of(s, &uid, NULL);
    int r = 0;
    if (!all || !own)
        r = out_of_memory(st);
    else if ((mkdir(all, 0700) < 0 && errno != EEXIST) ||
             (mkdir(own, 0700) < 0 && errno != EEXIST)) {
        dd_status_set(st, errno == ENOSPC ? DD_RESOURCE_EXHAUSTED : DD_INTERNAL, "SAVE_FAILED",
                      "%s: %s", own, strerror(errno));
        r = -1;
    }
    free(all);
    free(own);
    return r;
}

/* The room that the user has left for a save of this name. */
static int room(const dd_service *s, uint32_t uid, const char *name, uint64_t *ret_bytes,
                dd_status *st)
{
    const uint64_t most = s->o.config->limits.saved_bytes;
    struct sum x = { .but = name };
    if (!each_save(s, uid, add_save, &x))
        return out_of_memory(st);
    if (x.n >= DD_SAVES || x.bytes >= most) {
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "SAVE_LIMIT",
                      "%u saves of uid %u have %llu bytes, of %d and %llu: delete some (deltactl "
                      "saves delete NAME), or raise limits.saved_bytes",
                      x.n, uid, (unsigned long long)x.bytes, DD_SAVES, (unsigned long long)most);
        return -1;
    }
    *ret_bytes = most - x.bytes;
    return 0;
}

static void save(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st = { 0 };
    uint64_t bytes = 0;
    dd_session *x = dd_session_find(s, q->session_id, &r->peer, dd_peer_may_end, &st);
    dd_save *v = NULL;
    if (x && dd_session_check_idle(x, q, &st) == 0 && make_folders(s, r->peer.uid, &st) == 0 &&
        room(s, r->peer.uid, q->name, &bytes, &st) == 0) {
        if (!x->timeline)
            dd_status_set(&st, DD_FAILED_PRECONDITION, "NOT_COMPUTED",
                          "the session was not at work since the daemon began, or was taken back: "
                          "take a turn, or append, first");
        else if (is_being_saved(s, x->timeline))
            dd_status_set(&st, DD_ABORTED, "SESSION_BUSY", "the session is being saved");
        else
            v = save_new(s, r, q->name, true, &st);
    }
    if (v && !(v->text = (char *)dd_keep_encode(s, x, &v->len))) {
        save_free(v);
        v = NULL;
        (void)out_of_memory(&st);
    }
    if (!v) {
        dd_refuse(r, &st);
        return;
    }
    r->handler = v;
    v->timeline = x->timeline;
    dd_timeline_save(x->timeline, v->id, &(delta_save){ v->path, v->text, v->len, bytes });
}

void dd_saves_note(dd_service *s, const dd_note *n)
{
    dd_save *v = s->saves;
    while (v && v->id != n->run)
        v = v->next;
    if (!v)
        return;
    dd_status st = { 0 };
    dd_wire_out o = { 0 };
    v->result = n->error;
    (void)snprintf(v->err.text, sizeof v->err.text, "%s", n->text ? n->text : "");
    if (n->error) {
        status_of(&st, v);
    } else {
        put_save(&o, v->name, n->bytes, 0);
        dd_wire_put_varint(&o, 2, n->total);
    }
    answer(v, &o, &st);
}

/* ---- restoring */

static int read_at(int fd, char *to, size_t n, size_t *ret_n)
{
    size_t at = 0;
    while (at < n) {
        const ssize_t k = pread(fd, to + at, n - at, (off_t)at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k < 0)
            return -1;
        if (k == 0)
            break;
        at += (size_t)k;
    }
    *ret_n = at;
    return 0;
}

/* The head and the conversation. */
static int read_text(dd_save *v, delta_error *err)
{
    char line[DD_KEEP_HEAD], sha[65];
    size_t n = 0, head = 0, body = 0;
    const int fd = open(v->path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    int r = 0;
    if (fd < 0)
        return delta_fail(err, errno == ENOENT ? DELTA_ENOTFOUND : DELTA_EIO, "%s: %s", v->path,
                          strerror(errno));
    if (read_at(fd, line, sizeof line, &n) < 0)
        r = delta_fail(err, DELTA_EIO, "%s: %s", v->path, strerror(errno));
    else if (!dd_keep_head(line, n, &head, &body, sha))
        r = delta_fail(err, DELTA_EFORMAT, "%s: damaged at offset 0", v->path);
    else if (!(v->text = malloc(head + body + 1)))
        r = delta_fail(err, DELTA_ENOMEM, "%s: no memory", v->path);
    else if (read_at(fd, v->text, head + body, &v->len) < 0)
        r = delta_fail(err, DELTA_EIO, "%s: %s", v->path, strerror(errno));
    else if (v->len != head + body)
        r = delta_fail(err, DELTA_EFORMAT, "%s: damaged: it ends at offset %zu", v->path, v->len);
    else if (!(v->body = dd_keep_body(v->text, v->len, &v->n_body)))
        r = delta_fail(err, DELTA_EFORMAT, "%s: damaged before offset %zu", v->path, v->len);
    (void)close(fd);
    return r;
}

static void read_save(uv_work_t *w)
{
    dd_save *v = w->data;
    v->result = read_text(v, &v->err);
    if (v->result == 0)
        v->result = dd_engine_check_save(v->s->engine, v->path, delta_save_state_at(v->len),
                                         &v->n_tokens, &v->err);
}

static void on_read(uv_work_t *w, int status)
{
    dd_save *v = w->data;
    dd_service *s = v->s;
    dd_status st = { 0 };
    dd_wire_out o = { 0 };
    dd_session *x = NULL;
    if (status < 0)
        v->result = delta_fail(&v->err, DELTA_ECANCELLED, "the daemon is stopping");
    if (v->result < 0)
        status_of(&st, v);
    else if (v->rpc && dd_session_check_count(s, 1, &st) == 0) {
        x = dd_keep_decode(s, v->path, v->body, v->n_body, &v->peer, &v->err);
        if (!x) {
            v->result = v->err.code;
            status_of(&st, v);
        }
    }
    if (x) {
        x->save_path = v->path;
        x->save_at = delta_save_state_at(v->len);
        v->path = NULL;
        dd_session_put(&o, x);
        dd_wire_put_varint(&o, 2, v->n_tokens);
        dd_keep_changed(s, x);
    }
    answer(v, &o, &st);
    dd_live_timer(s);
}

static void restore(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st = { 0 };
    dd_save *v = save_new(s, r, q->name, false, &st);
    if (v) {
        v->work.data = v;
        if (uv_queue_work(s->o.loop, &v->work, read_save, on_read) < 0) {
            save_free(v);
            v = NULL;
            (void)out_of_memory(&st);
        }
    }
    if (v)
        r->handler = v;
    else
        dd_refuse(r, &st);
}

void dd_saves_call(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st = { 0 };
    if (!r->peer.is_unix)
        dd_status_set(&st, DD_PERMISSION_DENIED, "NOT_LOCAL",
                      "saves are of users, who are known on the Unix socket alone");
    else if (!s->o.config->state.directory[0] || !s->o.config->limits.saved_bytes)
        dd_status_set(&st, DD_FAILED_PRECONDITION, "NO_SAVES",
                      "saves need state.directory, limits.saved_bytes and cache.disk_bytes");
    if (st.code)
        dd_refuse(r, &st);
    else if (r->method->id == DD_M_SAVE)
        save(s, r, q);
    else if (r->method->id == DD_M_RESTORE)
        restore(s, r, q);
    else if (r->method->id == DD_M_SAVES)
        list(s, r);
    else
        delete (s, r, q);
}
