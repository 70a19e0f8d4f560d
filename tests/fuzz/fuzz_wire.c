/* fuzz_wire.c -- any bytes as a message of deltad.v1 (the first byte says which), and as the two
 * messages that are decoded by hand: what the walk in front of the generated decoder lets through is
 * unpacked within the memory that was promised, and what is packed from that passes again. */
#include <stdlib.h>
#include <string.h>

#include "daemon/codec_std.h"
#include "daemon/wire.h"
#include "deltad/v1/inference.pb-c.h"
#include "deltad/v1/session.pb-c.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const ProtobufCMessageDescriptor *const kinds[] = {
    &deltad__v1__chat_request__descriptor,
    &deltad__v1__generate_request__descriptor,
    &deltad__v1__create_session_request__descriptor,
    &deltad__v1__chat_event__descriptor,
    &deltad__v1__message__descriptor,
    &deltad__v1__tool__descriptor,
};

static void check_again(const ProtobufCMessageDescriptor *d, const ProtobufCMessage *m)
{
    const size_t len = protobuf_c_message_get_packed_size(m);
    uint8_t *bytes = malloc(len + 1);
    de_arena a;
    dd_status st = { 0 };
    if (!bytes || protobuf_c_message_pack(m, bytes) != len)
        abort();
    const ProtobufCMessage *again = dd_wire_unpack(d, &a, bytes, len, &st);
    if (!again && strcmp(st.reason, "REQUEST_TOO_LARGE") != 0)
        abort(); /* what was read cannot be read when it is written */
    if (again && protobuf_c_message_get_packed_size(again) != len)
        abort();
    de_arena_done(&a);
    free(bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    const ProtobufCMessageDescriptor *d = kinds[data[0] % (sizeof kinds / sizeof *kinds)];
    const uint8_t *msg = data + 1;
    const size_t len = size - 1;
    dd_status st = { 0 };
    dd_bytes service;
    dd_reflection_request q;
    de_arena a;
    const int ok = dd_wire_check(d, msg, len, &st);
    if (ok < 0 && (st.code != DD_INVALID_ARGUMENT || !st.reason || !st.message[0]))
        abort(); /* a refusal without a reason */
    memset(&st, 0, sizeof st);
    const ProtobufCMessage *m = dd_wire_unpack(d, &a, msg, len, &st);
    if (m && ok < 0)
        abort();
    if (!m && (st.code != DD_INVALID_ARGUMENT || !st.reason))
        abort();
    if (a.used > a.limit)
        abort();
    if (m)
        check_again(d, m);
    de_arena_done(&a);
    if (dd_health_request_decode(msg, len, &service) == 0 && service.len &&
        (service.data < msg || service.data + service.len > msg + len))
        abort();
    if (dd_reflection_request_decode(msg, len, &q) == 0 && q.name.len &&
        (q.name.data < msg || q.name.data + q.name.len > msg + len))
        abort();
    return 0;
}
