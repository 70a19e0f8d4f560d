/* codec_std.h -- the messages of others that every gRPC server speaks.
 *
 * ttrpc's envelope, grpc.health.v1 and grpc.reflection.v1 (v1alpha is the same on the wire);
 * google.rpc.Status stands in rpc.h as dd_status_encode(). All of them are a few fields, so they
 * are read and written by a walker of the wire format instead of generated code: nothing is
 * allocated for what a peer sends, and nothing a peer sends can make it recurse.
 *
 * Ownership  decoded strings are borrowed from the message, not terminated, and valid UTF-8
 *            without NUL. Encoders return malloc'ed bytes, or NULL when memory ran out.
 * Errors     decoders return 0, or -1 for bytes that are not such a message. */
#ifndef DD_CODEC_STD_H
#define DD_CODEC_STD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/rpc.h"

typedef struct dd_bytes {
    const uint8_t *data; /* may be NULL if len is 0 */
    size_t len;
} dd_bytes;

/* ---- protobuf on the wire */

/* One field after the other; of groups, which nobody has used for years, it knows nothing. */
typedef struct dd_wire_field {
    uint32_t number; /* 1 .. 2^29-1 */
    uint32_t type;   /* 0 varint, 1 fixed64, 2 bytes, 5 fixed32 */
    uint64_t value;  /* types 0, 1, 5 */
    dd_bytes bytes;  /* type 2 */
} dd_wire_field;
/* 1: *ret_f is the next field, and *rest begins after it; 0: the end; -1: malformed. */
int dd_wire_next(dd_bytes *rest, dd_wire_field *ret_f);
bool dd_wire_is_text(dd_bytes b); /* UTF-8 without NUL */

/* Grows as it is written; after the first failure it stays failed and writes nothing. */
typedef struct dd_wire_out {
    uint8_t *data;
    size_t len, size;
    bool failed;
} dd_wire_out;
void dd_wire_put_varint(dd_wire_out *o, uint32_t field, uint64_t v); /* written even if 0 */
void dd_wire_put_bytes(dd_wire_out *o, uint32_t field, const void *data, size_t len);
/* The bytes, now the caller's; never NULL unless memory ran out. */
uint8_t *dd_wire_take(dd_wire_out *o, size_t *ret_len);

/* ---- ttrpc */

typedef struct dd_ttrpc_request {
    dd_bytes service, method, payload;
    int64_t timeout_ns;  /* 0: none; negative: already passed */
    dd_bytes request_id; /* metadata x-request-id, the first one; else empty */
} dd_ttrpc_request;
int dd_ttrpc_request_decode(const uint8_t *msg, size_t len, dd_ttrpc_request *ret);
/* A Response with st unless it is NULL or OK, and with the payload otherwise. */
uint8_t *dd_ttrpc_response_encode(const dd_status *st, dd_bytes payload, size_t *ret_len);

/* ---- grpc.health.v1 */

enum dd_health { DD_HEALTH_SERVING = 1, DD_HEALTH_NOT_SERVING = 2, DD_HEALTH_UNKNOWN_SERVICE = 3 };
int dd_health_request_decode(const uint8_t *msg, size_t len, dd_bytes *ret_service);
uint8_t *dd_health_response_encode(enum dd_health h, size_t *ret_len);

/* ---- grpc.reflection.v1 */

enum dd_reflection_kind {
    DD_REFLECTION_NONE = 0, /* no question at all */
    DD_REFLECTION_FILE = 3,
    DD_REFLECTION_SYMBOL = 4,
    DD_REFLECTION_EXTENSION = 5,
    DD_REFLECTION_EXTENSION_NUMBERS = 6,
    DD_REFLECTION_SERVICES = 7,
};
typedef struct dd_reflection_request {
    enum dd_reflection_kind kind; /* of several the last one, as protobuf has it */
    dd_bytes host, name;
    dd_bytes whole; /* the request itself: answers repeat it */
} dd_reflection_request;
int dd_reflection_request_decode(const uint8_t *msg, size_t len, dd_reflection_request *ret);
/* Answers: files (FileDescriptorProtos), names of services, or an error. */
uint8_t *dd_reflection_files_encode(const dd_reflection_request *q, const dd_bytes *files, size_t n,
                                    size_t *ret_len);
uint8_t *dd_reflection_services_encode(const dd_reflection_request *q, const dd_bytes *names,
                                       size_t n, size_t *ret_len);
uint8_t *dd_reflection_error_encode(const dd_reflection_request *q, enum dd_grpc_code code,
                                    const char *text, size_t *ret_len);

#endif
