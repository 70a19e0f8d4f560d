/* error.h -- how every part of deltad says what went wrong.
 *
 * Functions that can fail return 0 or a negative code of this list, and put
 * the detail (what, where, which value) into a delta_error if they get one.
 * The callee explains; the outermost caller logs, once. */
#ifndef DELTA_ERROR_H
#define DELTA_ERROR_H

#include <stdarg.h>

#ifdef __cplusplus
extern "C" {
#endif

/* X(name, number, text). Numbers are stable: they are also exit details in logs. */
#define DELTA_ERROR_MAP(X)                                                                         \
    X(EINVALID, 1, "invalid argument")                                                             \
    X(ENOMEM, 2, "out of memory")                                                                  \
    X(EBUSY, 3, "no room now, try again")                                                          \
    X(ELIMIT, 4, "a fixed limit is exceeded")                                                      \
    X(EFORMAT, 5, "malformed file or text")                                                        \
    X(EIO, 6, "input/output error")                                                                \
    X(ENOTFOUND, 7, "not found")                                                                   \
    X(EUNSUPPORTED, 8, "not supported")                                                            \
    X(ECANCELLED, 9, "cancelled")                                                                  \
    X(EDEVICE, 10, "device fault")                                                                 \
    X(ESTATE, 11, "wrong state for this call")                                                     \
    X(EINTERNAL, 12, "internal error")

enum delta_code {
    DELTA_OK = 0,
#define X(name, number, text) DELTA_##name = -(number),
    DELTA_ERROR_MAP(X)
#undef X
};

typedef struct delta_error {
    int code;       /* enum delta_code */
    char text[496]; /* one line, no newline at the end, UTF-8 */
} delta_error;

/* "EINVALID" and "invalid argument"; "OK" for 0, "E?" for a foreign number. */
const char *delta_code_name(int code);
const char *delta_code_text(int code);

/* Fills *err (if not NULL) and returns code, so that callers can
 * `return delta_fail(err, DELTA_EINVALID, "ctx_tokens %u ...", n);` */
#ifdef __GNUC__
__attribute__((format(printf, 3, 4)))
#endif
int delta_fail(delta_error *err, int code, const char *format, ...);

/* Puts "prefix: " before the text of an error that passes through. */
#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
void delta_error_prefix(delta_error *err, const char *format, ...);

#ifdef __cplusplus
}
#endif
#endif
