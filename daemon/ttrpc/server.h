/* server.h -- ttrpc 1.2 on connections that were accepted elsewhere.
 *
 * ttrpc has neither flow control nor cancelling, so these are rules of ours: a connection with
 * more than 64 KiB of answers queued is neither read nor told that its sends were taken; one
 * that takes nothing for limits.stall_limit is cut; a connection that closes cancels its calls.
 *
 * Limits     DD_TTRPC_CALLS_MAX calls of a connection at once, the next is RESOURCE_EXHAUSTED;
 *            frames of 4 MiB in both directions.
 * Threads    loop thread only. */
#ifndef DD_TTRPC_SERVER_H
#define DD_TTRPC_SERVER_H

#include "daemon/service.h"

enum { DD_TTRPC_CALLS_MAX = 64, DD_TTRPC_QUEUE_BYTES = 65536 };

typedef struct dd_ttrpc_server dd_ttrpc_server;

/* on_closed comes once for each connection that was added, with its number. */
int dd_ttrpc_server_new(uv_loop_t *loop, const dd_config *c, dd_service *s,
                        void (*on_closed)(void *arg, const dd_peer *peer), void *arg,
                        dd_ttrpc_server **ret_t, delta_error *err);
/* Takes the non-blocking socket. <0: it was closed; on_closed does not come. */
int dd_ttrpc_server_add(dd_ttrpc_server *t, int fd, const dd_peer *peer);
/* Connections end when their answers are out, with `now` at once. on_gone comes when none is
 * left and all their calls have been finished by the handlers; never within this call. */
void dd_ttrpc_server_shutdown(dd_ttrpc_server *t, bool now, void (*on_gone)(void *arg), void *arg);
/* After on_gone, or before the first connection. The loop must run once more. */
void dd_ttrpc_server_free(dd_ttrpc_server *t);

#endif
