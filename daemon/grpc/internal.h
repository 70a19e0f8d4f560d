/* internal.h -- the server's fields that call.c needs. */
#ifndef DD_GRPC_INTERNAL_H
#define DD_GRPC_INTERNAL_H

#include <grpc/grpc.h>
#include <pthread.h>

#include "daemon/grpc/call.h"
#include "daemon/grpc/server.h"

struct dd_grpc_server {
    uv_loop_t *loop;
    const dd_config *config;
    dd_service *service;
    const dd_peer *(*peer_of)(void *arg, int fd);
    void *arg;

    grpc_server *server;
    grpc_completion_queue *queue;
    pthread_t thread; /* takes completions, does nothing else */
    pthread_mutex_t mutex;
    dd_tag *first, **last; /* under the mutex: completions on their way to the loop */
    uv_async_t wake;
    uv_timer_t sweep;
    uint32_t n_handles;

    dd_grpc_slot *slots;
    size_t n_slots;
    dd_grpc_call *calls;
    size_t n_allocated; /* calls, also those that only wait for a peer */
    dd_tag shutdown_tag;
    bool is_shutting, is_shut;
    void (*on_gone)(void *arg);
    void *on_gone_arg;
};

/* Has stalled calls looked for as long as there are calls. */
void dd_grpc_server_watch(dd_grpc_server *g);

#endif
