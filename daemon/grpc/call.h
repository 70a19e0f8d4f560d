/* call.h -- one gRPC call: its batches, and its end.
 *
 * A tag is what a batch is known by on the completion queue; each is in flight at most once, so
 * tags are linked to the list that crosses threads without an allocation.
 *
 * Ownership  a call lives while its handler holds it or a batch of it is in flight.
 * Threads    loop thread only, but for the fields of a tag in flight. */
#ifndef DD_GRPC_CALL_H
#define DD_GRPC_CALL_H

#include <grpc/grpc.h>

#include "daemon/service.h"

struct dd_grpc_server;

enum dd_tag_kind {
    DD_TAG_NEW,      /* the server gave us a call */
    DD_TAG_CLOSE,    /* it is over: cancelled, or its status is out */
    DD_TAG_METADATA, /* initial metadata were taken */
    DD_TAG_RECEIVED, /* a message of a bidi call, or its half-close */
    DD_TAG_SENT,
    DD_TAG_STATUS,
    DD_TAG_SHUTDOWN, /* of the server; no call */
};
typedef struct dd_tag {
    struct dd_tag *next;
    struct dd_grpc_call *call;
    enum dd_tag_kind kind;
    bool ok;
} dd_tag;

/* A method as gRPC knows it; method NULL: everything that is not registered. */
typedef struct dd_grpc_slot {
    const dd_method *method;
    void *registered;
} dd_grpc_slot;

typedef struct dd_grpc_call {
    dd_rpc rpc; /* first: the handlers' view is ours */
    struct dd_grpc_server *server;
    struct dd_grpc_call *next, **link; /* of the server's live calls */
    const dd_grpc_slot *slot;
    uint32_t n_refs; /* batches in flight, and one for the handler */
    grpc_call *call;
    grpc_call_details details; /* of unregistered methods */
    gpr_timespec deadline;
    grpc_metadata_array metadata;
    grpc_byte_buffer *in, *out;
    int cancelled;
    bool is_linked, has_metadata_out, is_sending, is_receiving, is_half_closed;
    bool is_finished; /* by the handler */
    bool is_waiting;  /* finished, but a send is outstanding: the handler's part stays */
    bool is_over;     /* RECV_CLOSE has come */
    uint64_t sending_since_ns;
    dd_status *last; /* the status, while is_waiting */
    dd_tag tags[DD_TAG_STATUS + 1];
} dd_grpc_call;

/* Asks the server for the next call of the slot's method. false: no memory, or shutting down. */
bool dd_grpc_call_request(struct dd_grpc_server *g, const dd_grpc_slot *slot);
/* A tag has come back. */
void dd_grpc_call_event(dd_grpc_call *c, dd_tag *tag);
/* Ends a call whose send has been waiting since before then_ns. */
void dd_grpc_call_check_stall(dd_grpc_call *c, uint64_t then_ns);

#endif
