/* sha256.h -- SHA-256 (FIPS 180-4) of bytes in memory.
 *
 * It tells known files apart (the chat template). It guards no secret: no care
 * is taken about timing. */
#ifndef DE_SHA256_H
#define DE_SHA256_H

#include <stddef.h>

/* hex: 64 lower-case digits and a NUL. p may be NULL if n is 0. */
void de_sha256_hex(const void *p, size_t n, char hex[65]);

#endif
