/* file.c -- see file.h. */
#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
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
