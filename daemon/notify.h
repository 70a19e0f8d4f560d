/* notify.h -- what the daemon tells systemd: READY, STATUS, RELOADING, STOPPING, WATCHDOG.
 *
 * Without NOTIFY_SOCKET every call does nothing.
 *
 * Ownership  one dd_notify for the daemon; free it before its loop is closed.
 * Threads    loop thread only. */
#ifndef DD_NOTIFY_H
#define DD_NOTIFY_H

#include <uv.h>

#include "delta/error.h"

typedef struct dd_notify dd_notify;

/* heartbeat is asked from dd_notify_ready() on: the watchdog is fed only while its result rises,
 * so that a stuck engine ends as a dead one does. */
int dd_notify_new(uv_loop_t *loop, uint64_t (*heartbeat)(void *arg), void *arg, dd_notify **ret_n,
                  delta_error *err);
/* "Loading weights: 42 %", at most one a second; asks for more start-up time as long as it moves. */
void dd_notify_loading(dd_notify *n, const char *phase, double progress);
void dd_notify_ready(dd_notify *n, const char *status); /* again after a reload */
void dd_notify_reloading(dd_notify *n);
void dd_notify_stopping(dd_notify *n, const char *status);
/* Closes its timer; the memory goes when the loop has closed it. NULL is a no-op. */
void dd_notify_free(dd_notify *n);

#endif
