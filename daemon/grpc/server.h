/* server.h -- gRPC on connections that were accepted elsewhere.
 *
 * No header of gRPC is needed to use this one, nor to see it.
 *
 * Why so     gRPC core gets connected sockets and no listener: its own dies at the first EMFILE,
 *            and no peer credentials can be had from it. It polls on one thread of ours that
 *            does nothing but hand completions to the loop, where all calls live.
 *
 * Limits     see the table in server.c; a call whose peer takes nothing for limits.stall_limit
 *            is cancelled. Requests that are compressed are refused (UNIMPLEMENTED): their
 *            unpacked size would have no limit.
 * Threads    loop thread only. */
#ifndef DD_GRPC_SERVER_H
#define DD_GRPC_SERVER_H

#include "daemon/service.h"

typedef struct dd_grpc_server dd_grpc_server;

/* peer_of tells whose socket a descriptor handed over before is; NULL: it is gone. */
int dd_grpc_server_new(uv_loop_t *loop, const dd_config *c, dd_service *s,
                       const dd_peer *(*peer_of)(void *arg, int fd), void *arg,
                       dd_grpc_server **ret_g, delta_error *err);
/* Takes the non-blocking socket; gRPC closes it when it likes. */
void dd_grpc_server_add(dd_grpc_server *g, int fd);
/* No new calls; connections end when their calls have, with `now` at once. on_gone comes when
 * none is left and all calls have been finished by the handlers; never within this call. */
void dd_grpc_server_shutdown(dd_grpc_server *g, bool now, void (*on_gone)(void *arg), void *arg);
/* After on_gone. The loop must run once more. */
void dd_grpc_server_free(dd_grpc_server *g);

#endif
