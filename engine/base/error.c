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

int delta_fail(delta_error *err, int code, const char *format, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, format);
        (void)vsnprintf(err->text, sizeof err->text, format, ap);
        va_end(ap);
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
}
