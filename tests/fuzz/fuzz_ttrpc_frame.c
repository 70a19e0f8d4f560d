/* fuzz_ttrpc_frame.c -- what a ttrpc client may send: frames in cuts taken from the input, and
 * the envelope in each. The first byte chooses the cuts. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/codec_std.h"
#include "daemon/reflection.h"
#include "daemon/ttrpc/frame.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void take(const dd_frame *f, const uint8_t *payload, uint32_t *last)
{
    dd_ttrpc_request q;
    size_t len;
    bool malformed;
    assert(f->stream % 2 == 1 && f->len <= DD_FRAME_MAX);
    if (f->type == DD_FRAME_REQUEST) {
        assert(f->stream > *last);
        *last = f->stream;
    }
    if (dd_ttrpc_request_decode(payload, f->len, &q) < 0)
        return;
    assert(dd_wire_is_text(q.service) && dd_wire_is_text(q.method));
    assert(q.payload.len <= f->len);
    free(dd_reflection_answer(q.payload.data, q.payload.len, &len, &malformed));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    dd_frame_reader r = { 0 };
    dd_frame f;
    const uint8_t *payload;
    uint32_t last = 0;
    if (size == 0)
        return 0;
    size_t cut = 1 + data[0];
    for (size_t at = 1; at < size; at += cut) {
        size_t n = size - at < cut ? size - at : cut;
        uint8_t *to = dd_frame_room(&r, n);
        if (!to)
            break;
        memcpy(to, data + at, n);
        dd_frame_fed(&r, n);
        while (dd_frame_next(&r, &f, &payload) > 0)
            take(&f, payload, &last);
        if (r.broken)
            break;
    }
    dd_frame_reader_done(&r);
    return 0;
}
