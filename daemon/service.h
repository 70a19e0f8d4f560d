/* service.h -- all RPC handlers: decode, check, do, encode.
 *
 * Owns live requests and named sessions (session.c), talks to the engine thread through the
 * mailbox, and to transports through rpc.h alone.
 *
 * Threads    loop thread only. */
#ifndef DD_SERVICE_H
#define DD_SERVICE_H

#include <uv.h>

#include "daemon/config.h"
#include "daemon/rpc.h"

enum dd_phase { DD_LOADING, DD_SERVING, DD_DRAINING };

typedef struct dd_service_options {
    uv_loop_t *loop;
    const dd_config *config;
    /* The engine is opened by the engine thread; this tells how it goes. progress in 0 .. 1. */
    void (*on_load)(void *arg, const char *phase, double progress);
    void (*on_ready)(void *arg);
    void (*on_fatal)(void *arg, const char *why); /* the daemon must exit with failure */
    void *arg;
} dd_service_options;

/* Starts the engine thread; on_load / on_ready / on_fatal come on the loop. */
int dd_service_new(const dd_service_options *o, dd_service **ret_s, delta_error *err);
/* NOT_SERVING at once; new calls get UNAVAILABLE; on_drained when the last live request ended. */
void dd_service_drain(dd_service *s, void (*on_drained)(void *arg), void *arg);
/* Ends all live requests with UNAVAILABLE (the drain limit has passed): streams say Finished
 * first. Called again, it ends what is left without that. */
void dd_service_abort_all(dd_service *s);
/* All requests must have ended. Joins the engine thread. */
void dd_service_free(dd_service *s);

enum dd_phase dd_service_phase(const dd_service *s);
/* Rises whenever the engine thread completes a step or waits idle in its mailbox: fed to the watchdog. */
uint64_t dd_service_heartbeat(const dd_service *s);

/* Set by the listener for GetStats. */
void dd_service_connections(dd_service *s, uint32_t now, uint64_t total);

#endif
