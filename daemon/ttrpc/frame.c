/* frame.c -- see frame.h. */
#include "daemon/ttrpc/frame.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { KEEP_BYTES = 16384 }; /* an empty reader keeps a buffer of at most so much */

static void put_u32(uint8_t *to, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        to[i] = (uint8_t)(v >> (24 - 8 * i));
}

static uint32_t get_u32(const uint8_t *from)
{
    return (uint32_t)from[0] << 24 | (uint32_t)from[1] << 16 | (uint32_t)from[2] << 8 | from[3];
}

void dd_frame_put(uint8_t to[DD_FRAME_HEADER], const dd_frame *f)
{
    put_u32(to, f->len);
    put_u32(to + 4, f->stream);
    to[8] = f->type;
    to[9] = f->flags;
}

dd_frame dd_frame_get(const uint8_t from[DD_FRAME_HEADER])
{
    return (dd_frame){ get_u32(from), get_u32(from + 4), from[8], from[9] };
}

uint8_t *dd_frame_room(dd_frame_reader *r, size_t n)
{
    if (r->at) {
        memmove(r->data, r->data + r->at, r->len - r->at);
        r->len -= r->at;
        r->at = 0;
    }
    if (r->len == 0 && r->size > KEEP_BYTES && n <= KEEP_BYTES) {
        free(r->data);
        r->data = NULL;
        r->size = 0;
    }
    if (n > r->size - r->len) {
        size_t size = r->size ? r->size : n;
        while (size - r->len < n)
            size *= 2; /* at most what one frame and one read may hold */
        uint8_t *p = realloc(r->data, size);
        if (!p)
            return NULL;
        r->data = p;
        r->size = size;
    }
    return r->data + r->len;
}

void dd_frame_fed(dd_frame_reader *r, size_t n)
{
    assert(n <= r->size - r->len);
    r->len += n;
}

/* What breaks the rules in a header of a client, or NULL. */
static const char *check(const dd_frame *f, uint32_t last_stream)
{
    if (f->len > DD_FRAME_MAX)
        return "a frame is longer than 4 MiB";
    if (f->flags & ~(DD_FRAME_CLOSED | DD_FRAME_OPEN | DD_FRAME_NO_DATA))
        return "a frame has unknown flags";
    if ((f->flags & DD_FRAME_NO_DATA) && f->len)
        return "a frame without data has data";
    if (f->stream % 2 == 0)
        return "a client's stream has an even number";
    switch (f->type) {
    case DD_FRAME_REQUEST:
        return f->stream > last_stream ? NULL : "stream numbers do not rise";
    case DD_FRAME_DATA:
        return f->stream <= last_stream ? NULL : "data for a stream that was never opened";
    default:
        return "a frame has a type that clients do not send";
    }
}

int dd_frame_next(dd_frame_reader *r, dd_frame *ret_f, const uint8_t **ret_payload)
{
    size_t n = r->len - r->at;
    if (r->broken)
        return -1;
    if (n < DD_FRAME_HEADER)
        return 0;
    dd_frame f = dd_frame_get(r->data + r->at);
    r->broken = check(&f, r->last_stream);
    if (r->broken)
        return -1;
    if (n - DD_FRAME_HEADER < f.len)
        return 0;
    if (f.type == DD_FRAME_REQUEST)
        r->last_stream = f.stream;
    *ret_payload = r->data + r->at + DD_FRAME_HEADER;
    *ret_f = f;
    r->at += DD_FRAME_HEADER + f.len;
    return 1;
}

void dd_frame_reader_done(dd_frame_reader *r)
{
    free(r->data);
    *r = (dd_frame_reader){ 0 };
}
