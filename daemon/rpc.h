/* rpc.h -- one call as the handlers see it, whatever bytes it came in by.
 *
 * The seam between transports (grpc/, ttrpc/) and handlers (service.c). A
 * transport allocates a struct whose first member is a dd_rpc, fills it, and
 * calls dd_service_start(). Messages are protobuf bytes in both directions.
 *
 * Life       start -> message(s) -> [send <-> sent]* -> finish. The handler calls
 *            vt->finish exactly once, always, also after dd_service_closed(); after
 *            that it never touches the dd_rpc again and the transport frees it.
 * Flow       at most one send is outstanding; the next one waits for dd_service_sent().
 *            finish may be called while a send is outstanding: the transport orders them.
 *            The next message of a bidi call comes when no send is outstanding.
 *            No function of the vtable calls back into the handlers before it returns.
 * Stall      a peer that takes nothing for limits.stall_limit is cut by the transport, which
 *            the handlers see as dd_service_closed().
 * Threads    loop thread only. */
#ifndef DD_RPC_H
#define DD_RPC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* gRPC's status codes; ttrpc uses the same numbers. */
enum dd_grpc_code {
    DD_OK = 0,
    DD_CANCELLED = 1,
    DD_UNKNOWN = 2,
    DD_INVALID_ARGUMENT = 3,
    DD_DEADLINE_EXCEEDED = 4,
    DD_NOT_FOUND = 5,
    DD_ALREADY_EXISTS = 6,
    DD_PERMISSION_DENIED = 7,
    DD_RESOURCE_EXHAUSTED = 8,
    DD_FAILED_PRECONDITION = 9,
    DD_ABORTED = 10,
    DD_OUT_OF_RANGE = 11,
    DD_UNIMPLEMENTED = 12,
    DD_INTERNAL = 13,
    DD_UNAVAILABLE = 14,
    DD_DATA_LOSS = 15,
    DD_UNAUTHENTICATED = 16,
};

/* How a call ends. reason is the ErrorInfo reason, an upper-case literal ("FIELD_INVALID"). */
typedef struct dd_status {
    enum dd_grpc_code code;
    const char *reason;  /* static string; NULL if OK */
    char message[400];   /* one line for people */
    char field[96];      /* INVALID_ARGUMENT: path of the field, or "" */
    uint32_t retry_ms;   /* RetryInfo if not 0 */
    const char *missing; /* NOT_FOUND: ResourceInfo's type, static ("deltad.v1.Session"), or NULL */
    char missing_name[64];
    struct {
        const char *key; /* static string */
        char value[64];
    } meta[4]; /* ErrorInfo.metadata */
    uint32_t n_meta;
} dd_status;

__attribute__((format(printf, 4, 5))) void
dd_status_set(dd_status *st, enum dd_grpc_code code, const char *reason, const char *format, ...);
/* google.rpc.Status with ErrorInfo (always), BadRequest, RetryInfo as they apply: malloc'ed
 * protobuf bytes, NULL when memory ran out. In codec_std.c. */
uint8_t *dd_status_encode(const dd_status *st, size_t *ret_len);

typedef struct dd_peer {
    uint64_t connection; /* number of the connection, from 1 */
    bool is_unix;
    bool is_loopback;
    uint32_t uid, gid;   /* SO_PEERCRED; unix only, else UINT32_MAX */
    int32_t pid;         /* 0 if unknown */
    bool in_admin_group; /* policy.admin_group, when it connected; unix only */
    uint8_t address[16]; /* TCP: what limits go by (peer.h), IPv4 as ::ffff:a.b.c.d */
    char text[64];       /* "unix uid 1000 pid 4711", "127.0.0.1:53412" */
} dd_peer;

enum dd_shape_of_call { DD_UNARY, DD_SERVER_STREAM, DD_BIDI };
typedef struct dd_method {
    const char *path; /* "/deltad.v1.InferenceService/Chat" */
    enum dd_shape_of_call shape;
    uint32_t id; /* enum dd_method_id of service.h */
} dd_method;

typedef struct dd_rpc dd_rpc;
typedef struct dd_rpc_vtable {
    /* Sends one message. Takes ownership of msg (malloc'ed). */
    void (*send)(dd_rpc *r, uint8_t *msg, size_t len);
    /* Ends the call. st is read during the call. */
    void (*finish)(dd_rpc *r, const dd_status *st);
} dd_rpc_vtable;

struct dd_rpc {
    const dd_rpc_vtable *vt;
    const dd_method *method;
    dd_peer peer;
    uint64_t arrived_ns;  /* CLOCK_MONOTONIC */
    uint64_t deadline_ns; /* CLOCK_MONOTONIC; 0: none */
    char request_id[64];  /* x-request-id of the metadata, or "" */
    void *handler;        /* the handler's own; NULL at start */
};

typedef struct dd_service dd_service; /* service.h */

/* Every method that is served, for registering; n entries. */
const dd_method *dd_service_methods(size_t *ret_n);
const dd_method *dd_service_method_find(const char *path, size_t len); /* NULL: unknown */

/* transport -> handlers */
void dd_service_start(dd_service *s, dd_rpc *r);
/* One request message, bytes borrowed. Unary and server streams: exactly one. */
void dd_service_message(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len);
void dd_service_half_closed(dd_service *s, dd_rpc *r); /* bidi: no more messages */
void dd_service_sent(dd_service *s, dd_rpc *r);        /* the outstanding send was taken */
/* The peer cancelled, its deadline passed or its connection is gone. Unless finish was called
 * before, the handler calls it now or later, with any status. */
void dd_service_closed(dd_service *s, dd_rpc *r);

#endif
