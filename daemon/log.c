/* log.c -- lines of the log, safe to write from any thread and never waited for.
 *
 * Under systemd stderr is the journal's stream (JOURNAL_STREAM names it): a line begins with "<N>",
 * its priority, and the journal adds time and program. On a terminal it is "deltad: text"; in a
 * file or pipe a UTC time and the level stand before it.
 *
 * What a client sent may be in a line, so control characters and broken UTF-8 are written as \xNN:
 * one call is one line and nothing in it steers a terminal.
 *
 * Never      waits for a reader: a full pipe or socket loses the line, and the next one that gets
 *            through says how many were lost. Never allocates. */
#include "daemon/log.h"

#include "base/utf8.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { LINE_BYTES = 2048 }; /* with its newline; below PIPE_BUF, so that lines do not mix */

/* Written once by dd_log_init(), before there are threads. */
static enum { TO_FILE, TO_TERMINAL, TO_JOURNAL } form = TO_FILE;
static bool is_socket, can_block;
static atomic_int max_level = DD_LOG_INFO;
static atomic_uint lost;

static bool stderr_is_journal(const struct stat *st)
{
    const char *stream = getenv("JOURNAL_STREAM"); /* "device:inode" */
    unsigned long long device, inode;
    return stream && sscanf(stream, "%llu:%llu", &device, &inode) == 2 && st->st_dev == device &&
           st->st_ino == inode;
}

void dd_log_init(enum dd_log_level max)
{
    struct stat st;
    dd_log_set_level(max);
    form = isatty(STDERR_FILENO) ? TO_TERMINAL : TO_FILE;
    if (fstat(STDERR_FILENO, &st) == 0) {
        is_socket = S_ISSOCK(st.st_mode);
        can_block = S_ISFIFO(st.st_mode);
        if (stderr_is_journal(&st))
            form = TO_JOURNAL;
    }
}

void dd_log_set_level(enum dd_log_level max)
{
    atomic_store_explicit(&max_level, max, memory_order_relaxed);
}

static const char *level_name(enum dd_log_level level)
{
    switch (level) {
    case DD_LOG_ERROR:
        return "error";
    case DD_LOG_WARNING:
        return "warning";
    case DD_LOG_NOTICE:
        return "notice";
    case DD_LOG_INFO:
        return "info";
    case DD_LOG_DEBUG:
        return "debug";
    }
    return "?";
}

static size_t put_head(char *to, size_t size, enum dd_log_level level)
{
    int n = 0;
    if (form == TO_JOURNAL) {
        n = snprintf(to, size, "<%d>", (int)level);
    } else if (form == TO_TERMINAL) {
        n = snprintf(to, size, "deltad: %s%s", level <= DD_LOG_WARNING ? level_name(level) : "",
                     level <= DD_LOG_WARNING ? ": " : "");
    } else {
        struct timespec now;
        struct tm tm;
        (void)clock_gettime(CLOCK_REALTIME, &now);
        (void)gmtime_r(&now.tv_sec, &tm);
        size_t at = strftime(to, size, "%Y-%m-%dT%H:%M:%S", &tm);
        int m =
            snprintf(to + at, size - at, ".%03ldZ %s ", now.tv_nsec / 1000000, level_name(level));
        n = (int)at + m;
    }
    return n < 0 ? 0 : (size_t)n;
}

/* Length of the UTF-8 character at s (NUL-terminated) if it is whole, well formed and printable; 0
 * if not. U+0080 .. U+009F steer terminals as well. */
static size_t printable(const unsigned char *s)
{
    if (s[0] < 0x80)
        return s[0] >= 0x20 && s[0] != 0x7f;
    return s[0] == 0xc2 && s[1] < 0xa0 ? 0 : de_utf8_len(s, strnlen((const char *)s, 4));
}

/* Appends text to a line that has `at` bytes and room for `room`, which must leave 4 for the end;
 * what does not fit is cut and marked. */
static size_t put_text(char *to, size_t at, size_t room, const char *text)
{
    for (const unsigned char *s = (const unsigned char *)text; *s;) {
        size_t n = printable(s);
        char hex[8];
        const char *from = (const char *)s;
        size_t len = n;
        if (n == 0) {
            n = 1;
            len = (size_t)snprintf(hex, sizeof hex, "\\x%02x", *s);
            from = hex;
        }
        if (at + len > room) {
            memcpy(to + at, "...", 3);
            return at + 3;
        }
        memcpy(to + at, from, len);
        at += len;
        s += n;
    }
    return at;
}

static bool write_line(const char *line, size_t len)
{
    ssize_t n;
    if (can_block) {
        struct pollfd p = { .fd = STDERR_FILENO, .events = POLLOUT };
        if (poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT))
            return false;
    }
    do
        n = is_socket ? send(STDERR_FILENO, line, len, MSG_DONTWAIT | MSG_NOSIGNAL)
                      : write(STDERR_FILENO, line, len);
    while (n < 0 && errno == EINTR);
    return n == (ssize_t)len;
}

static void log_text(enum dd_log_level level, const char *text)
{
    char line[LINE_BYTES];
    unsigned n_lost = atomic_exchange_explicit(&lost, 0, memory_order_relaxed);
    if (n_lost) {
        char note[64];
        (void)snprintf(note, sizeof note, "%u lines of this log were lost", n_lost);
        size_t len = put_text(line, put_head(line, 64, DD_LOG_WARNING), sizeof line - 4, note);
        line[len++] = '\n';
        if (!write_line(line, len)) {
            atomic_fetch_add_explicit(&lost, n_lost + 1, memory_order_relaxed);
            return;
        }
    }
    size_t len = put_text(line, put_head(line, 64, level), sizeof line - 4, text);
    line[len++] = '\n';
    if (!write_line(line, len))
        atomic_fetch_add_explicit(&lost, 1, memory_order_relaxed);
}

__attribute__((format(printf, 2, 0))) static void log_v(enum dd_log_level level, const char *format,
                                                        va_list ap)
{
    int saved = errno; /* callers log between a failing call and its strerror() */
    char text[LINE_BYTES];
    (void)vsnprintf(text, sizeof text, format, ap);
    log_text(level, text);
    errno = saved;
}

void dd_log(enum dd_log_level level, const char *format, ...)
{
    if ((int)level > atomic_load_explicit(&max_level, memory_order_relaxed))
        return;
    va_list ap;
    va_start(ap, format);
    log_v(level, format, ap);
    va_end(ap);
}

void dd_log_limited(dd_log_limit *l, uint32_t per_second, enum dd_log_level level,
                    const char *format, ...)
{
    if ((int)level > atomic_load_explicit(&max_level, memory_order_relaxed))
        return;
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t now_ns = (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
    if (l->window_ns == 0 || now_ns - l->window_ns >= 1000000000U) {
        if (l->dropped)
            dd_log(level, "(%u more lines like the next one were left out)", l->dropped);
        *l = (dd_log_limit){ .window_ns = now_ns };
    }
    if (l->n >= per_second) {
        l->dropped++;
        return;
    }
    l->n++;
    va_list ap;
    va_start(ap, format);
    log_v(level, format, ap);
    va_end(ap);
}
