/* listen.h -- sockets, accept, peer credentials and caps, for both transports.
 *
 * Why own accept: gRPC core's listener dies at the first EMFILE, unlinks live
 * sockets and hides the peer's uid. Sockets are inherited from systemd by name
 * ("grpc", "ttrpc"), else made here: a Unix socket path in use by a live
 * process is refused, a stale one is replaced; mode and group as configured.
 *
 * Threads    loop thread only. */
#ifndef DD_LISTEN_H
#define DD_LISTEN_H

#include "daemon/config.h"
#include "daemon/service.h"

typedef struct dd_listen dd_listen;

int dd_listen_new(uv_loop_t *loop, const dd_config *c, dd_service *s, dd_listen **ret_l,
                  delta_error *err);
/* Begins to accept. Before that, connections wait in the backlog. */
void dd_listen_start(dd_listen *l);
void dd_listen_stop(dd_listen *l); /* closes the listeners; connections stay */
/* on_gone comes when the last connection and call has gone; with `now` they are cut. */
void dd_listen_shutdown(dd_listen *l, bool now, void (*on_gone)(void *arg), void *arg);
void dd_listen_free(dd_listen *l);

#endif
