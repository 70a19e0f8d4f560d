/* log.h -- the one place that prints: journal if stderr is it, else lines on stderr.
 *
 * Threads    any thread; a line is written with one write(2). Never blocks on a
 *            full journal for more than the kernel does.
 * Limits     a line is cut at 2 KiB; control characters are escaped. */
#ifndef DD_LOG_H
#define DD_LOG_H

#include <stdint.h>

enum dd_log_level {
    DD_LOG_ERROR = 3,
    DD_LOG_WARNING = 4,
    DD_LOG_NOTICE = 5,
    DD_LOG_INFO = 6,
    DD_LOG_DEBUG = 7
};

void dd_log_init(enum dd_log_level max); /* before threads; finds out about the journal */
void dd_log_set_level(enum dd_log_level max);
__attribute__((format(printf, 2, 3))) void dd_log(enum dd_log_level level, const char *format, ...);

/* At most `per_second` lines of one place in the code get through; the rest is counted and told. */
typedef struct dd_log_limit {
    uint64_t window_ns;
    uint32_t n, dropped;
} dd_log_limit;
__attribute__((format(printf, 4, 5))) void dd_log_limited(dd_log_limit *l, uint32_t per_second,
                                                          enum dd_log_level level,
                                                          const char *format, ...);

#endif
