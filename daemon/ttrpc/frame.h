/* frame.h -- the frames of ttrpc 1.2, and the rules a client must keep.
 *
 * A frame is ten bytes (length u32, stream u32, both big-endian, type u8, flags u8) and a
 * payload. Pure: bytes in, frames out; no socket, no clock.
 *
 * Limits     a payload is at most DD_FRAME_MAX bytes, the protocol's own limit. The buffer of a
 *            reader grows with what has come, never with what a header promises.
 * Errors     what breaks a rule is final: the caller closes the connection. */
#ifndef DD_TTRPC_FRAME_H
#define DD_TTRPC_FRAME_H

#include <stddef.h>
#include <stdint.h>

enum { DD_FRAME_HEADER = 10, DD_FRAME_MAX = 4 << 20 };
enum dd_frame_type { DD_FRAME_REQUEST = 1, DD_FRAME_RESPONSE = 2, DD_FRAME_DATA = 3 };
enum dd_frame_flag {
    DD_FRAME_CLOSED = 1,  /* the sender sends no more on this stream */
    DD_FRAME_OPEN = 2,    /* the sender will send more */
    DD_FRAME_NO_DATA = 4, /* no message, not even an empty one */
};

typedef struct dd_frame {
    uint32_t len; /* of the payload */
    uint32_t stream;
    uint8_t type, flags;
} dd_frame;

void dd_frame_put(uint8_t to[DD_FRAME_HEADER], const dd_frame *f);
dd_frame dd_frame_get(const uint8_t from[DD_FRAME_HEADER]);

/* The side of a server: takes bytes in any cuts and gives whole frames that keep the rules.
 * Zeroed memory is a fresh reader. */
typedef struct dd_frame_reader {
    uint8_t *data; /* bytes [at, len) are not consumed */
    size_t at, len, size;
    uint32_t last_stream; /* newest id that a request has opened */
    const char *broken;   /* why no more frames come; static text */
} dd_frame_reader;

/* Room for n bytes more: write up to n bytes there, then say how many with dd_frame_fed().
 * NULL when memory ran out. */
uint8_t *dd_frame_room(dd_frame_reader *r, size_t n);
void dd_frame_fed(dd_frame_reader *r, size_t n);
/* 1: *ret_f is the next frame; its payload is borrowed until the next call on r.
 * 0: more bytes are needed. -1: a rule was broken, r->broken says which. */
int dd_frame_next(dd_frame_reader *r, dd_frame *ret_f, const uint8_t **ret_payload);
void dd_frame_reader_done(dd_frame_reader *r);

#endif
