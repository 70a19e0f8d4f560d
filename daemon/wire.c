/* wire.c -- see wire.h. */
#include "daemon/wire.h"

#include <stdio.h>
#include <string.h>

#include "daemon/codec_std.h"
#include "daemon/limits.h"

typedef struct frame {
    const ProtobufCMessageDescriptor *d;
    dd_bytes rest;
    const char *name; /* of the field that holds it */
} frame;

static int fault(const frame *frames, size_t n, const char *leaf, const char *what, dd_status *st)
{
    size_t at = 0;
    dd_status_set(st, DD_INVALID_ARGUMENT, "MALFORMED", "the request is malformed: %s", what);
    for (size_t i = 1; i <= n; i++) {
        const char *name = i < n ? frames[i].name : leaf;
        if (!name || at >= sizeof st->field)
            continue;
        int r = snprintf(st->field + at, sizeof st->field - at, "%s%s", at ? "." : "", name);
        at += r > 0 ? (size_t)r : 0;
    }
    return -1;
}

static bool is_packed(const ProtobufCFieldDescriptor *f)
{
    return f->label == PROTOBUF_C_LABEL_REPEATED && f->type != PROTOBUF_C_TYPE_STRING &&
           f->type != PROTOBUF_C_TYPE_BYTES && f->type != PROTOBUF_C_TYPE_MESSAGE;
}

static uint32_t wire_type(const ProtobufCFieldDescriptor *f)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
    case PROTOBUF_C_TYPE_MESSAGE:
        return 2;
    case PROTOBUF_C_TYPE_SFIXED32:
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_FLOAT:
        return 5;
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return 1;
    default:
        return 0;
    }
}

int dd_wire_check(const ProtobufCMessageDescriptor *d, const uint8_t *msg, size_t len,
                  dd_status *st)
{
    frame frames[DD_WIRE_DEPTH] = { { d, { msg, len }, NULL } };
    size_t n = 1;
    while (n) {
        frame *top = &frames[n - 1];
        dd_wire_field w;
        int r = dd_wire_next(&top->rest, &w);
        if (r < 0)
            return fault(frames, n, NULL, "a length or a tag is wrong", st);
        if (r == 0) {
            n--;
            continue;
        }
        const ProtobufCFieldDescriptor *f =
            protobuf_c_message_descriptor_get_field(top->d, w.number);
        if (!f)
            continue; /* a field of a later version */
        if (w.type != wire_type(f) && !(w.type == 2 && is_packed(f)))
            return fault(frames, n, f->name, "a field has the wrong type", st);
        if (f->type == PROTOBUF_C_TYPE_STRING && !dd_wire_is_text(w.bytes))
            return fault(frames, n, f->name, "text is not UTF-8 without NUL", st);
        if (f->type == PROTOBUF_C_TYPE_MESSAGE) {
            if (n == DD_WIRE_DEPTH)
                return fault(frames, n, f->name, "messages are nested too deeply", st);
            frames[n++] = (frame){ f->descriptor, w.bytes, f->name };
        }
    }
    return 0;
}

static void *arena_alloc(void *a, size_t size)
{
    return de_arena_alloc(a, size);
}

static void arena_free(void *a, void *p)
{
    (void)a;
    (void)p;
}

ProtobufCMessage *dd_wire_unpack(const ProtobufCMessageDescriptor *d, de_arena *a,
                                 const uint8_t *msg, size_t len, dd_status *st)
{
    size_t limit = len * DD_WIRE_ARENA_FACTOR + DD_WIRE_ARENA_BASE;
    ProtobufCAllocator allocator = { arena_alloc, arena_free, a };
    de_arena_init(a, limit);
    if (dd_wire_check(d, msg, len, st) < 0)
        return NULL;
    ProtobufCMessage *m = protobuf_c_message_unpack(d, &allocator, len, msg);
    if (!m && a->used > limit / 2)
        dd_status_set(st, DD_INVALID_ARGUMENT, "REQUEST_TOO_LARGE",
                      "the request needs more than %zu bytes when unpacked", limit);
    else if (!m)
        dd_status_set(st, DD_INVALID_ARGUMENT, "MALFORMED", "the request is malformed");
    return m;
}

ProtobufCMessage *dd_wire_unpack_own(const ProtobufCMessageDescriptor *d, de_arena *a,
                                     const uint8_t *msg, size_t len)
{
    ProtobufCAllocator allocator = { arena_alloc, arena_free, a };
    a->limit += len * DD_WIRE_ARENA_FACTOR + 4096;
    return protobuf_c_message_unpack(d, &allocator, len, msg);
}
