/* file.h -- small files, whole. */
#ifndef DE_FILE_H
#define DE_FILE_H

#include <stddef.h>

#include "delta/error.h"

/* The whole of a regular file of at most max_bytes, malloc'ed and NUL-terminated.
 * DELTA_ENOTFOUND, DELTA_EIO, DELTA_ELIMIT, DELTA_ENOMEM; the error names the path. */
int de_file_read(const char *path, size_t max_bytes, char **ret_text, size_t *ret_len,
                 delta_error *err);

/* The file has these bytes from then on, also over a crash: they go to path + ".new", to the disk, and
 * then in its place. A process that ends anywhere in between, or a disk that is full, leaves the old
 * file; what is left of a ".new" is written over next time. Not two at once for one path.
 * DELTA_EIO, DELTA_ENOMEM, DELTA_ELIMIT (the disk, a quota or a limit is full). */
int de_file_replace(const char *path, const void *bytes, size_t len, delta_error *err);

/* dir + "/" + name, malloc'ed; NULL when memory ran out. */
char *de_path_join(const char *dir, const char *name);

#endif
