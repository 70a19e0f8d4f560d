/* status.c -- fills a dd_status. Encoding it is codec_std.c's work. */
#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "daemon/rpc.h"

void dd_status_set(dd_status *st, enum dd_grpc_code code, const char *reason, const char *format,
                   ...)
{
    assert(st && format);
    memset(st, 0, sizeof *st);
    st->code = code;
    st->reason = reason;
    va_list ap;
    va_start(ap, format);
    (void)vsnprintf(st->message, sizeof st->message, format, ap);
    va_end(ap);
}
