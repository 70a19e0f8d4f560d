/* file.h -- small files as text. */
#ifndef DE_FILE_H
#define DE_FILE_H

#include <stddef.h>

#include "delta/error.h"

/* The whole of a regular file of at most max_bytes, malloc'ed and NUL-terminated.
 * DELTA_ENOTFOUND, DELTA_EIO, DELTA_ELIMIT, DELTA_ENOMEM; the error names the path. */
int de_file_read(const char *path, size_t max_bytes, char **ret_text, size_t *ret_len,
                 delta_error *err);

/* dir + "/" + name, malloc'ed; NULL when memory ran out. */
char *de_path_join(const char *dir, const char *name);

#endif
