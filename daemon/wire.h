/* wire.h -- what may be unpacked, and in how much memory.
 *
 * protobuf-c neither bounds its recursion nor checks UTF-8, and a short message can unpack to a
 * large tree. So the bytes are walked first, along the descriptors, and unpacked into an arena
 * with a limit.
 *
 * Limits     DD_WIRE_DEPTH messages deep; strings are UTF-8 without NUL; memory
 *            DD_WIRE_ARENA_FACTOR * len + DD_WIRE_ARENA_BASE.
 * Threads    any; an arena belongs to one. */
#ifndef DD_WIRE_H
#define DD_WIRE_H

#include <protobuf-c/protobuf-c.h>
#include <stdint.h>

#include "base/arena.h"
#include "daemon/rpc.h"

/* 0 or -1 with *st filled (INVALID_ARGUMENT, reason MALFORMED, field the path of the fault). */
int dd_wire_check(const ProtobufCMessageDescriptor *d, const uint8_t *msg, size_t len,
                  dd_status *st);
/* Checks, starts the arena and unpacks into it. The caller ends the arena, also on failure. */
ProtobufCMessage *dd_wire_unpack(const ProtobufCMessageDescriptor *d, de_arena *a,
                                 const uint8_t *msg, size_t len, dd_status *st);

/* Unpacks what this daemon packed itself into an arena that has begun; its limit rises by what
 * that may take. NULL: out of memory. */
ProtobufCMessage *dd_wire_unpack_own(const ProtobufCMessageDescriptor *d, de_arena *a,
                                     const uint8_t *msg, size_t len);

#endif
