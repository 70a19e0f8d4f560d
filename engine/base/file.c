/* file.c -- see file.h. */
#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int de_file_read(const char *path, size_t max_bytes, char **ret_text, size_t *ret_len,
                 delta_error *err)
{
    /* a FIFO without a writer must not hold us: not waited for, then refused */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return delta_fail(err, errno == ENOENT ? DELTA_ENOTFOUND : DELTA_EIO, "%s: %s", path,
                          strerror(errno));
    struct stat st;
    char *text = NULL;
    size_t n = 0;
    int r;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        r = delta_fail(err, DELTA_EIO, "%s: not a regular file", path);
    } else if ((uint64_t)st.st_size > max_bytes) {
        r = delta_fail(err, DELTA_ELIMIT, "%s: %lld bytes, more than %zu", path,
                       (long long)st.st_size, max_bytes);
    } else if (!(text = malloc((size_t)st.st_size + 1))) {
        r = delta_fail(err, DELTA_ENOMEM, "%s: %lld bytes", path, (long long)st.st_size);
    } else {
        ssize_t got = 1;
        while (n < (size_t)st.st_size && got > 0) {
            got = read(fd, text + n, (size_t)st.st_size - n);
            if (got < 0 && errno == EINTR)
                got = 1;
            else if (got > 0)
                n += (size_t)got;
        }
        r = got < 0 ? delta_fail(err, DELTA_EIO, "%s: %s", path, strerror(errno)) : 0;
    }
    (void)close(fd);
    if (r < 0) {
        free(text);
        return r;
    }
    text[n] = 0;
    *ret_text = text;
    *ret_len = n;
    return 0;
}

static int full_or_broken(const char *path, const char *what, delta_error *err)
{
    const bool full = errno == ENOSPC || errno == EDQUOT || errno == EFBIG;
    return delta_fail(err, full ? DELTA_ELIMIT : DELTA_EIO, "%s: %s: %s", path, what,
                      strerror(errno));
}

/* The name in its folder is on the disk, too. */
static int sync_folder(const char *path, delta_error *err)
{
    char *folder = strdup(path);
    if (!folder)
        return delta_fail(err, DELTA_ENOMEM, "%s: no memory for a path", path);
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = 0;
    int fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(folder);
    const int r = fd < 0 || fsync(fd) < 0 ? full_or_broken(path, "its folder", err) : 0;
    if (fd >= 0)
        (void)close(fd);
    return r;
}

int de_file_replace(const char *path, const void *bytes, size_t len, delta_error *err)
{
    const size_t n = strlen(path);
    char *new = malloc(n + 5);
    if (!new)
        return delta_fail(err, DELTA_ENOMEM, "%s: no memory for a path", path);
    memcpy(new, path, n);
    memcpy(new + n, ".new", 5);
    int r = 0, fd = open(new, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        r = full_or_broken(new, "cannot be written", err);
    for (size_t at = 0; r == 0 && at < len;) {
        const ssize_t put = write(fd, (const char *)bytes + at, len - at);
        if (put > 0)
            at += (size_t)put;
        else if (put == 0 || errno != EINTR)
            r = full_or_broken(new, "writing", err);
    }
    if (r == 0 && fsync(fd) < 0)
        r = full_or_broken(new, "writing", err);
    if (fd >= 0 && close(fd) < 0 && r == 0)
        r = full_or_broken(new, "writing", err);
    if (r == 0 && rename(new, path) < 0)
        r = full_or_broken(path, "cannot be replaced", err);
    if (r < 0 && fd >= 0)
        (void)unlink(new); /* a full disk has use for the room */
    free(new);
    return r < 0 ? r : sync_folder(path, err);
}

char *de_path_join(const char *dir, const char *name)
{
    size_t a = strlen(dir), b = strlen(name);
    char *p = malloc(a + b + 2);
    if (!p)
        return NULL;
    memcpy(p, dir, a);
    p[a] = '/';
    memcpy(p + a + 1, name, b + 1);
    return p;
}
