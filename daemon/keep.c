/* keep.c -- named sessions on disk, so that they survive a restart.
 *
 * After every turn the transcript, the tools, the settings and the tokens of the answers go to
 * DIR/sessions/ID.session, whole, by a worker thread; a session that changes meanwhile is written
 * again. The first turn after a restart renders the conversation from that, token for token. The
 * model's state is not in it.
 *
 * A file is a line "deltad session 1 LENGTH SHA256" and a SavedSession (saved.proto) of that many
 * bytes. It is replaced whole (base/file.h): a process that is killed, or a full disk, leaves the one
 * before. One that cannot be read, or is of another model, stays where it is and is told in the log.
 *
 * Threads    the loop, but write_file(). */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/sha256.h"
#include "daemon/live.h"
#include "daemon/log.h"

enum { FILE_BYTES = 512 << 20 };
static const char suffix[] = ".session";

typedef struct job {
    uv_work_t work;
    dd_service *s;
    char id[DD_ID_BYTES];
    char *path;
    uint8_t *bytes;
    size_t len;
    int result;
    delta_error err;
} job;

static bool is_on(const dd_service *s)
{
    return s->o.config->state.directory[0] != 0;
}

/* DIR/sessions or, with an id, its file; malloc'ed, NULL: no memory. */
static char *path_of(const dd_service *s, const char *id)
{
    const char *dir = s->o.config->state.directory;
    const size_t size = strlen(dir) + DD_ID_BYTES + 32;
    char *p = malloc(size);
    if (p && id)
        (void)snprintf(p, size, "%s/sessions/%s%s", dir, id, suffix);
    else if (p)
        (void)snprintf(p, size, "%s/sessions", dir);
    return p;
}

static dd_session *session_of(const dd_service *s, const char *id)
{
    dd_session *x = s->sessions;
    while (x && strcmp(x->id, id) != 0)
        x = x->next;
    return x;
}

/* ---- writing */

uint8_t *dd_keep_encode(const dd_service *s, const dd_session *x, size_t *ret_len)
{
    const dd_saved saved = dd_session_saved(s, x);
    size_t n = 0;
    uint8_t *body = dd_saved_encode(&saved, &n), *all = body ? malloc(DD_KEEP_HEAD + n) : NULL;
    if (all) {
        char sha[65];
        de_sha256_hex(body, n, sha);
        const int head = snprintf((char *)all, DD_KEEP_HEAD, "deltad session 1 %zu %s\n", n, sha);
        memcpy(all + head, body, n);
        *ret_len = (size_t)head + n;
    }
    free(body);
    return all;
}

static void write_file(uv_work_t *w)
{
    job *j = w->data;
    j->result = de_file_replace(j->path, j->bytes, j->len, &j->err);
}

static void job_free(job *j)
{
    free(j->path);
    free(j->bytes);
    free(j);
}

static void on_written(uv_work_t *w, int status)
{
    job *j = w->data;
    dd_service *s = j->s;
    dd_session *x = session_of(s, j->id);
    s->n_keeping--;
    if (status == 0 && j->result < 0)
        dd_log(DD_LOG_WARNING,
               "session %s is not kept: %s; what was kept of it before is still there", j->id,
               j->err.text);
    if (x) {
        x->is_keeping = false;
        if (x->is_changed)
            dd_keep_changed(s, x);
    } else if (!s->is_freed) {
        (void)unlink(j->path); /* it was closed meanwhile */
    }
    job_free(j);
}

void dd_keep_changed(dd_service *s, dd_session *x)
{
    if (!is_on(s))
        return;
    x->is_changed = true;
    if (x->is_keeping)
        return;
    job *j = calloc(1, sizeof *j);
    if (!j)
        return; /* with the next turn */
    j->work.data = j;
    j->s = s;
    (void)snprintf(j->id, sizeof j->id, "%s", x->id);
    j->path = path_of(s, x->id);
    j->bytes = dd_keep_encode(s, x, &j->len);
    if (!j->path || !j->bytes || uv_queue_work(s->o.loop, &j->work, write_file, on_written) < 0) {
        dd_log(DD_LOG_WARNING, "session %s is not kept: no memory", x->id);
        job_free(j);
        return;
    }
    x->is_changed = false;
    x->is_keeping = true;
    s->n_keeping++;
}

void dd_keep_forget(dd_service *s, const dd_session *x)
{
    char *path = is_on(s) ? path_of(s, x->id) : NULL;
    if (path)
        (void)unlink(path);
    free(path);
}

/* ---- reading */

static int add_messages(dd_session *x, const dd_saved *saved)
{
    for (size_t i = 0; i < saved->n_messages; i++)
        if (dd_session_add(x, saved->messages[i], &saved->sampled[i]) < 0)
            return -1;
    return 0;
}

bool dd_keep_head(const char *text, size_t len, size_t *ret_head, size_t *ret_body,
                  char ret_sha[65])
{
    char line[DD_KEEP_HEAD + 1];
    const char *end = memchr(text, '\n', len < DD_KEEP_HEAD ? len : DD_KEEP_HEAD);
    if (!end)
        return false;
    *ret_head = (size_t)(end + 1 - text);
    memcpy(line, text, *ret_head);
    line[*ret_head] = 0;
    return sscanf(line, "deltad session 1 %zu %64[0-9a-f]", ret_body, ret_sha) == 2 &&
           *ret_body <= FILE_BYTES;
}

const uint8_t *dd_keep_body(const char *text, size_t len, size_t *ret_len)
{
    char want[65] = "", got[65];
    size_t head = 0;
    if (!dd_keep_head(text, len, &head, ret_len, want) || head + *ret_len != len)
        return NULL;
    de_sha256_hex(text + head, *ret_len, got);
    return strcmp(want, got) == 0 ? (const uint8_t *)text + head : NULL;
}

dd_session *dd_keep_decode(dd_service *s, const char *path, const uint8_t *body, size_t n,
                           const dd_peer *owner, delta_error *err)
{
    dd_saved x;
    dd_status st = { 0 };
    de_arena a = { 0 };
    dd_session *y = NULL;
    int r = 0;
    if (dd_saved_decode(body, n, &a, &x, &st) < 0)
        r = delta_fail(err, DELTA_EFORMAT, "%s: %s %s", path, st.field, st.message);
    else if (strcmp(x.model, dd_engine_info(s->engine)->model_name) != 0)
        r = delta_fail(err, DELTA_ESTATE, "%s: it is of model %s, this is %s", path, x.model,
                       dd_engine_info(s->engine)->model_name);
    else if (!owner && session_of(s, x.id))
        r = delta_fail(err, DELTA_EFORMAT, "%s: the session is there already", path);
    if (r == 0) {
        dd_peer kept = { .is_unix = x.owner_is_unix, .uid = x.owner_uid };
        if (x.owner_address.len == sizeof kept.address)
            memcpy(kept.address, x.owner_address.data, sizeof kept.address);
        x.pinned = x.pinned && !owner;
        if (owner)
            x.id = NULL;
        y = dd_session_restore(s, &x, owner ? owner : &kept);
        if (!y || add_messages(y, &x) < 0) {
            dd_session_drop(s, y);
            y = NULL;
            (void)delta_fail(err, DELTA_ENOMEM, "%s: no memory", path);
        }
    }
    de_arena_done(&a);
    return y;
}

static int load(dd_service *s, const char *path, const char *id, delta_error *err)
{
    char *text = NULL;
    size_t len = 0;
    int r = de_file_read(path, FILE_BYTES, &text, &len, err);
    if (r < 0)
        return r;
    size_t n = 0;
    const uint8_t *body = dd_keep_body(text, len, &n);
    dd_session *x = NULL;
    if (body)
        x = dd_keep_decode(s, path, body, n, NULL, err);
    else
        (void)delta_fail(err, DELTA_EFORMAT, "%s: not whole", path);
    free(text);
    if (x && strcmp(x->id, id) != 0) {
        r = delta_fail(err, DELTA_EFORMAT, "%s: it is session %s", path, x->id);
        dd_session_drop(s, x);
        return r;
    }
    return x ? 0 : err->code;
}

void dd_keep_load(dd_service *s)
{
    char *folder = is_on(s) ? path_of(s, NULL) : NULL;
    size_t n = 0;
    if (!folder)
        return;
    if (mkdir(folder, 0700) < 0 && errno != EEXIST)
        dd_log(DD_LOG_WARNING, "sessions are not kept: %s: %s", folder, strerror(errno));
    DIR *d = opendir(folder);
    for (struct dirent *f; d && (f = readdir(d));) {
        char id[DD_ID_BYTES];
        const size_t len = strlen(f->d_name), tail = sizeof suffix - 1;
        if (len <= tail || len - tail >= sizeof id || strcmp(f->d_name + len - tail, suffix) != 0)
            continue;
        (void)snprintf(id, sizeof id, "%.*s", (int)(len - tail), f->d_name);
        char *path = path_of(s, id);
        delta_error err = { 0 };
        if (path && load(s, path, id, &err) < 0)
            dd_log(DD_LOG_WARNING, "a session is not taken up: %s", err.text);
        else
            n += path != NULL;
        free(path);
    }
    if (d)
        (void)closedir(d);
    if (n)
        dd_log(DD_LOG_INFO, "%zu sessions taken up from %s", n, folder);
    free(folder);
}
