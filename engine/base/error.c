/* error.c -- codes to names and texts, and the one formatter of error details. */
#include "delta/error.h"

#include <stdio.h>
#include <string.h>

const char *delta_code_name(int code)
{
    switch (code) {
    case DELTA_OK:
        return "OK";
#define X(name, number, text)                                                                      \
    case DELTA_##name:                                                                             \
        return #name;
        DELTA_ERROR_MAP(X)
#undef X
    }
    return "E?";
}

const char *delta_code_text(int code)
{
    switch (code) {
    case DELTA_OK:
        return "no error";
#define X(name, number, text)                                                                      \
    case DELTA_##name:                                                                             \
        return text;
        DELTA_ERROR_MAP(X)
#undef X
    }
    return "unknown error";
}

/* Keeps the promise of error.h: one line of UTF-8. Control characters (a file's name may hold them)
 * become blanks, and a character that the end of the buffer cut in two goes. */
static void tidy(char *text, size_t size)
{
    size_t n = 0;
    for (; text[n]; n++)
        if ((unsigned char)text[n] < 0x20 || text[n] == 0x7F)
            text[n] = ' ';
    if (n + 1 < size)
        return; /* nothing was cut */
    size_t at = n;
    while (at > 0 && n - at < 3 && ((unsigned char)text[at - 1] & 0xC0) == 0x80)
        at--;
    if (at == 0)
        return;
    const unsigned char lead = (unsigned char)text[at - 1];
    const size_t want = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
    if (want > n - at + 1)
        text[at - 1] = 0;
}

int delta_fail(delta_error *err, int code, const char *format, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, format);
        (void)vsnprintf(err->text, sizeof err->text, format, ap);
        va_end(ap);
        tidy(err->text, sizeof err->text);
        err->code = code;
    }
    return code;
}

void delta_error_prefix(delta_error *err, const char *format, ...)
{
    if (!err)
        return;
    char old[sizeof err->text];
    memcpy(old, err->text, sizeof old);
    va_list ap;
    va_start(ap, format);
    int n = vsnprintf(err->text, sizeof err->text, format, ap);
    va_end(ap);
    /* what does not fit is cut at the end */
    size_t at = n < 0 ? 0 : (size_t)n;
    for (const char *more = ": "; at + 1 < sizeof err->text && *more; more++)
        err->text[at++] = *more;
    for (const char *more = old; at + 1 < sizeof err->text && *more; more++)
        err->text[at++] = *more;
    if (at < sizeof err->text)
        err->text[at] = 0;
    tidy(err->text, sizeof err->text);
}
