/* weights.c -- see weights.h.
 *
 * Tensors of all shards stand in one array, found through an open-addressing
 * table. Per shard, the ranges are sorted once to see overlaps and holes: a
 * safetensors file is covered by its tensors without gaps. */
#include "model/weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/bits.h"
#include "base/file.h"
#include "base/json.h"

enum {
    HEADER_MAX = 16 << 20,
    INDEX_MAX = 64 << 20,
    SHARDS_MAX = 1000,
    TENSORS_MAX = 1 << 20,
    NAME_MAX_BYTES = 256
};

typedef struct shard {
    char *path;
    int fd;
    uint64_t size, data; /* of the file; where its data begin */
} shard;

struct de_weights {
    de_arena names;
    shard *shards;
    uint32_t n_shards;
    de_tensor *tensors;
    size_t n_tensors, cap_tensors;
    uint32_t *table; /* index + 1, 0: free */
    size_t table_size;
};

size_t de_dtype_bytes(enum de_dtype d)
{
    switch (d) {
    case DE_I64:
        return 8;
    case DE_F32:
    case DE_I32:
        return 4;
    case DE_F16:
    case DE_BF16:
        return 2;
    case DE_U8:
    case DE_I8:
        return 1;
    }
    return 0;
}

static const char *const dtype_names[] = { "F32", "F16", "BF16", "I64", "I32", "U8", "I8" };

const char *de_dtype_name(enum de_dtype d)
{
    return dtype_names[d];
}

static bool dtype_parse(const de_json *v, enum de_dtype *ret)
{
    for (int i = 0; i < (int)(sizeof dtype_names / sizeof *dtype_names); i++)
        if (de_json_is_string(v, dtype_names[i])) {
            *ret = (enum de_dtype)i;
            return true;
        }
    return false;
}

/* One entry of a header, checked but for its place in the file. */
static int read_entry(const de_json *e, uint64_t data_bytes, de_tensor *t, delta_error *err)
{
    const de_json *shape = de_json_get(e, "shape"), *range = de_json_get(e, "data_offsets");
    uint64_t begin, end, bytes;
    const de_json *dtype = de_json_get(e, "dtype");
    if (e->key_len == 0 || e->key_len > NAME_MAX_BYTES)
        return delta_fail(err, DELTA_EFORMAT, "tensor %.80s: its name has %u bytes, not 1..%d",
                          e->key, e->key_len, NAME_MAX_BYTES);
    if (!dtype || dtype->kind != DE_JSON_STRING)
        return delta_fail(err, DELTA_EFORMAT, "tensor %s: no dtype", e->key);
    if (!dtype_parse(dtype, &t->dtype))
        return delta_fail(err, DELTA_EUNSUPPORTED, "tensor %s: dtype %.20s is not read", e->key,
                          dtype->text);
    if (!shape || shape->kind != DE_JSON_ARRAY || shape->n > DE_MAX_RANK)
        return delta_fail(err, DELTA_EFORMAT, "tensor %s: shape must list at most %d numbers",
                          e->key, DE_MAX_RANK);
    bytes = de_dtype_bytes(t->dtype);
    t->rank = 0;
    for (const de_json *d = shape->child; d; d = d->next) {
        uint64_t n;
        if (!de_json_u64(d, &n) || !de_mul_u64(bytes, n, &bytes))
            return delta_fail(err, DELTA_EFORMAT, "tensor %s: impossible shape", e->key);
        t->dims[t->rank++] = n;
    }
    if (!range || range->kind != DE_JSON_ARRAY || range->n != 2 ||
        !de_json_u64(range->child, &begin) || !de_json_u64(range->child->next, &end) ||
        begin > end || end > data_bytes)
        return delta_fail(err, DELTA_EFORMAT,
                          "tensor %s: data_offsets must be two rising numbers within the file's "
                          "%llu bytes of data",
                          e->key, (unsigned long long)data_bytes);
    if (end - begin != bytes)
        return delta_fail(err, DELTA_EFORMAT,
                          "tensor %s: shape needs %llu bytes, data_offsets "
                          "span %llu",
                          e->key, (unsigned long long)bytes, (unsigned long long)(end - begin));
    t->offset = begin;
    t->bytes = bytes;
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const de_tensor *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* No overlap, no hole, nothing behind the last. Sorts the tensors. */
static int check_cover(de_tensor *t, size_t n, uint64_t data_bytes, delta_error *err)
{
    if (n)
        qsort(t, n, sizeof *t, by_offset);
    uint64_t at = 0;
    for (size_t i = 0; i < n; i++) {
        if (t[i].offset != at)
            return delta_fail(err, DELTA_EFORMAT, "tensor %s: its data %s", t[i].name,
                              t[i].offset < at ? "overlap another tensor's"
                                               : "are preceded by a hole");
        at += t[i].bytes;
    }
    if (at != data_bytes)
        return delta_fail(err, DELTA_EFORMAT, "%llu bytes of data belong to no tensor",
                          (unsigned long long)(data_bytes - at));
    return 0;
}

int de_weights_parse_header(de_arena *names, const char *text, size_t len, uint64_t data_bytes,
                            de_tensor **ret_tensors, size_t *ret_n, delta_error *err)
{
    de_arena tree;
    de_arena_init(&tree, 1u << 30);
    de_json *root;
    de_tensor *t = NULL;
    size_t n = 0;
    int r = len && text[0] == '{' ? de_json_parse(&tree, text, len, &root, err)
                                  : delta_fail(err, DELTA_EFORMAT, "header does not begin with {");
    if (r == 0 && root->n > TENSORS_MAX)
        r = delta_fail(err, DELTA_ELIMIT, "header lists more than %d tensors", TENSORS_MAX);
    if (r == 0 && !(t = calloc(root->n + 1, sizeof *t)))
        r = delta_fail(err, DELTA_ENOMEM, "%u tensors", root->n);
    for (const de_json *e = r == 0 ? root->child : NULL; e && r == 0; e = e->next) {
        if (strcmp(e->key, "__metadata__") == 0) {
            if (e->kind != DE_JSON_OBJECT)
                r = delta_fail(err, DELTA_EFORMAT, "__metadata__ is no JSON object");
            continue;
        }
        r = read_entry(e, data_bytes, &t[n], err);
        if (r == 0 && !(t[n].name = de_arena_strndup(names, e->key, e->key_len)))
            r = delta_fail(err, DELTA_ENOMEM, "names of tensors");
        n++;
    }
    if (r == 0)
        r = check_cover(t, n, data_bytes, err);
    de_arena_done(&tree);
    if (r < 0) {
        free(t);
        return r;
    }
    *ret_tensors = t;
    *ret_n = n;
    return 0;
}

/* ---- the table of names */

static const char *file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static uint64_t hash_text(const char *s)
{
    uint64_t h = 0xCBF29CE484222325u;
    for (; *s; s++)
        h = (h ^ (unsigned char)*s) * 0x100000001B3u;
    return h ^ h >> 29;
}

static uint32_t *slot_of(const de_weights *w, const char *name)
{
    size_t i = hash_text(name) & (w->table_size - 1);
    while (w->table[i] && strcmp(w->tensors[w->table[i] - 1].name, name) != 0)
        i = (i + 1) & (w->table_size - 1);
    return &w->table[i];
}

static int build_table(de_weights *w, delta_error *err)
{
    w->table_size = 16;
    while (w->table_size < w->n_tensors * 2)
        w->table_size *= 2;
    w->table = calloc(w->table_size, sizeof *w->table);
    if (!w->table)
        return delta_fail(err, DELTA_ENOMEM, "table of %zu tensors", w->n_tensors);
    for (size_t i = 0; i < w->n_tensors; i++) {
        uint32_t *slot = slot_of(w, w->tensors[i].name);
        if (*slot)
            return delta_fail(err, DELTA_EFORMAT, "%s: tensor %s stands in %s too",
                              w->shards[w->tensors[i].shard].path, w->tensors[i].name,
                              file_name(w->shards[w->tensors[*slot - 1].shard].path));
        *slot = (uint32_t)i + 1;
    }
    return 0;
}

const de_tensor *de_weights_find(const de_weights *w, const char *name)
{
    uint32_t i = *slot_of(w, name);
    return i ? &w->tensors[i - 1] : NULL;
}

size_t de_weights_count(const de_weights *w)
{
    return w->n_tensors;
}

const de_tensor *de_weights_at(const de_weights *w, size_t i)
{
    return &w->tensors[i];
}

const char *de_weights_shard_path(const de_weights *w, uint32_t shard_index)
{
    return w->shards[shard_index].path;
}

/* ---- files */

static int read_at(const shard *s, uint64_t offset, void *dst, size_t len, delta_error *err)
{
    char *p = dst;
    while (len) {
        ssize_t n = pread(s->fd, p, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return delta_fail(err, DELTA_EIO, "%s: %s", s->path, strerror(errno));
        if (n == 0)
            return delta_fail(err, DELTA_EIO, "%s: ends at byte %llu, it became shorter", s->path,
                              (unsigned long long)offset);
        p += n;
        offset += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

int de_weights_read(const de_weights *w, uint32_t shard_index, uint64_t offset, void *dst,
                    size_t len, delta_error *err)
{
    return read_at(&w->shards[shard_index], offset, dst, len, err);
}

static int add_tensors(de_weights *w, const de_tensor *t, size_t n, uint32_t shard_index,
                       delta_error *err)
{
    if (w->n_tensors + n > TENSORS_MAX)
        return delta_fail(err, DELTA_ELIMIT, "more than %d tensors", TENSORS_MAX);
    if (w->n_tensors + n > w->cap_tensors) {
        size_t cap = (w->n_tensors + n) * 2;
        de_tensor *p = realloc(w->tensors, cap * sizeof *p);
        if (!p)
            return delta_fail(err, DELTA_ENOMEM, "%zu tensors", cap);
        w->tensors = p;
        w->cap_tensors = cap;
    }
    for (size_t i = 0; i < n; i++) {
        de_tensor *to = &w->tensors[w->n_tensors++];
        *to = t[i];
        to->shard = shard_index;
        to->offset += w->shards[shard_index].data;
    }
    return 0;
}

/* Opens one shard and reads its directory. path is taken over. */
static int open_shard(de_weights *w, char *path, delta_error *err)
{
    shard *s = &w->shards[w->n_shards];
    *s = (shard){ .path = path, .fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK) };
    const uint32_t index = w->n_shards++;
    struct stat st;
    if (s->fd < 0 || fstat(s->fd, &st) < 0)
        return delta_fail(err, errno == ENOENT ? DELTA_ENOTFOUND : DELTA_EIO, "%s: %s", path,
                          strerror(errno));
    if (!S_ISREG(st.st_mode))
        return delta_fail(err, DELTA_EIO, "%s: not a regular file", path);
    s->size = (uint64_t)st.st_size;
    uint8_t head[8];
    if (s->size < sizeof head)
        return delta_fail(err, DELTA_EFORMAT, "%s: %llu bytes are no safetensors file", path,
                          (unsigned long long)s->size);
    int r = read_at(s, 0, head, sizeof head, err);
    if (r < 0)
        return r;
    uint64_t len = 0;
    for (int i = 7; i >= 0; i--)
        len = len << 8 | head[i];
    if (len > HEADER_MAX)
        return delta_fail(err, DELTA_ELIMIT, "%s: header of %llu bytes, more than %d", path,
                          (unsigned long long)len, HEADER_MAX);
    if (len > s->size - sizeof head)
        return delta_fail(err, DELTA_EFORMAT, "%s: header of %llu bytes in a file of %llu", path,
                          (unsigned long long)len, (unsigned long long)s->size);
    s->data = sizeof head + len;
    char *text = malloc(len + 1);
    if (!text)
        return delta_fail(err, DELTA_ENOMEM, "%s: header of %llu bytes", path,
                          (unsigned long long)len);
    de_tensor *t = NULL;
    size_t n = 0;
    r = read_at(s, sizeof head, text, len, err);
    if (r == 0) {
        r = de_weights_parse_header(&w->names, text, len, s->size - s->data, &t, &n, err);
        if (r < 0)
            delta_error_prefix(err, "%s", path);
    }
    if (r == 0)
        r = add_tensors(w, t, n, index, err);
    free(t);
    free(text);
    return r;
}

static int add_shard(de_weights *w, const char *dir, const char *name, delta_error *err)
{
    if (strchr(name, '/') || name[0] == '.' || name[0] == 0)
        return delta_fail(err, DELTA_EFORMAT, "%s: index names a shard outside its folder: %s", dir,
                          name);
    if (w->n_shards == SHARDS_MAX)
        return delta_fail(err, DELTA_ELIMIT, "%s: more than %d shards", dir, SHARDS_MAX);
    char *path = de_path_join(dir, name);
    if (!path)
        return delta_fail(err, DELTA_ENOMEM, "path of a shard");
    return open_shard(w, path, err);
}

/* Every tensor of the index is in the shard it names, and no shard has others. */
static int check_index(const de_weights *w, const char *path, const de_json *map, delta_error *err)
{
    for (const de_json *e = map->child; e; e = e->next) {
        const de_tensor *t = de_weights_find(w, e->key);
        if (!t)
            return delta_fail(err, DELTA_EFORMAT, "%s: tensor %s is missing in %s", path, e->key,
                              e->text);
        const char *in = file_name(w->shards[t->shard].path);
        if (strcmp(in, e->text) != 0)
            return delta_fail(err, DELTA_EFORMAT, "%s: tensor %s is in %s, not in %s", path, e->key,
                              in, e->text);
    }
    if (map->n == w->n_tensors)
        return 0;
    /* Names are unique on both sides, so one of the shards' is not in the index. */
    uint8_t *listed = calloc(w->n_tensors, 1);
    if (!listed)
        return delta_fail(err, DELTA_ENOMEM, "%zu tensors", w->n_tensors);
    for (const de_json *e = map->child; e; e = e->next)
        listed[de_weights_find(w, e->key) - w->tensors] = 1;
    size_t i = 0;
    while (i + 1 < w->n_tensors && listed[i])
        i++;
    free(listed);
    return delta_fail(err, DELTA_EFORMAT,
                      "%s: does not list %zu tensors of the shards, first %s in %s; is a file of "
                      "another checkpoint among them?",
                      path, w->n_tensors - map->n, w->tensors[i].name,
                      file_name(w->shards[w->tensors[i].shard].path));
}

static bool has_shard(const de_weights *w, const char *name)
{
    /* from the newest on: indexes list the tensors of a shard in a row, or nearly */
    for (uint32_t i = w->n_shards; i-- > 0;)
        if (strcmp(file_name(w->shards[i].path), name) == 0)
            return true;
    return false;
}

/* The extra shard that some exporters add: left out of the index, its tensors would be lost
 * without a word. */
static int check_mtp_file(const de_weights *w, const char *dir, delta_error *err)
{
    static const char name[] = "model_mtp.safetensors";
    if (has_shard(w, name))
        return 0;
    char *path = de_path_join(dir, name);
    if (!path)
        return delta_fail(err, DELTA_ENOMEM, "path of a shard");
    int r =
        access(path, F_OK) == 0
            ? delta_fail(err, DELTA_EFORMAT, "%s: is there, but the index does not name it", path)
            : 0;
    free(path);
    return r;
}

static int open_index(de_weights *w, const char *dir, const char *path, const char *text,
                      size_t len, delta_error *err)
{
    de_arena tree;
    de_arena_init(&tree, 1u << 30);
    de_json *root;
    int r = de_json_parse(&tree, text, len, &root, err);
    if (r < 0)
        delta_error_prefix(err, "%s", path);
    const de_json *map = r == 0 ? de_json_get(root, "weight_map") : NULL;
    if (r == 0 && (!map || map->kind != DE_JSON_OBJECT))
        r = delta_fail(err, DELTA_EFORMAT, "%s: no weight_map", path);
    for (const de_json *e = r == 0 ? map->child : NULL; e && r == 0; e = e->next) {
        if (e->kind != DE_JSON_STRING || strlen(e->text) != e->n) { /* "\u0000" may be in it */
            r = delta_fail(err, DELTA_EFORMAT, "%s: %s names no file", path, e->key);
            break;
        }
        if (!has_shard(w, e->text))
            r = add_shard(w, dir, e->text, err);
    }
    if (r == 0)
        r = build_table(w, err);
    if (r == 0)
        r = check_index(w, path, map, err);
    de_arena_done(&tree);
    return r < 0 ? r : check_mtp_file(w, dir, err);
}

int de_weights_open(const char *dir, de_weights **ret_w, delta_error *err)
{
    de_weights *w = calloc(1, sizeof *w);
    char *path = de_path_join(dir, "model.safetensors.index.json"), *text = NULL;
    size_t len;
    int r;
    if (!w || !path || !(w->shards = calloc(SHARDS_MAX, sizeof *w->shards))) {
        r = delta_fail(err, DELTA_ENOMEM, "directory of a checkpoint");
    } else {
        de_arena_init(&w->names, 1u << 30);
        r = de_file_read(path, INDEX_MAX, &text, &len, err);
        if (r == 0) {
            r = open_index(w, dir, path, text, len, err);
        } else if (r == DELTA_ENOTFOUND) {
            r = add_shard(w, dir, "model.safetensors", err);
            if (r == DELTA_ENOTFOUND)
                r = delta_fail(err, DELTA_ENOTFOUND,
                               "%s: neither model.safetensors.index.json nor "
                               "model.safetensors is there",
                               dir);
            if (r == 0)
                r = build_table(w, err);
        }
    }
    free(text);
    free(path);
    if (r < 0) {
        de_weights_free(w);
        return r;
    }
    *ret_w = w;
    return 0;
}

void de_weights_free(de_weights *w)
{
    if (!w)
        return;
    for (uint32_t i = 0; i < w->n_shards; i++) {
        if (w->shards[i].fd >= 0)
            (void)close(w->shards[i].fd);
        free(w->shards[i].path);
    }
    free(w->shards);
    free(w->tensors);
    free(w->table);
    de_arena_done(&w->names);
    free(w);
}
