/* fuzz_saved.c -- kept sessions: any bytes are a session or refused with a reason; what is one is the
 * same after it was written and read again. The line before it in a file says no more than there is. */
#include <stdlib.h>
#include <string.h>

#include "daemon/codec.h"
#include "daemon/live.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool is_same(dd_bytes a, dd_bytes b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    de_arena a = { 0 }, b = { 0 };
    dd_saved x, y;
    dd_status st = { 0 };
    size_t head = 0, body = 0;
    char sha[65];
    if (dd_keep_head((const char *)data, size, &head, &body, sha) &&
        (head == 0 || head > size || head > DD_KEEP_HEAD || strlen(sha) > 64))
        abort();
    const uint8_t *at = dd_keep_body((const char *)data, size, &body);
    if (at && (at < data || at + body != data + size))
        abort();
    if (dd_saved_decode(data, size, &a, &x, &st) < 0) {
        if (st.code == DD_OK || !st.reason || !st.message[0])
            abort();
    } else {
        size_t len = 0;
        uint8_t *bytes = dd_saved_encode(&x, &len);
        if (!bytes || dd_saved_decode(bytes, len, &b, &y, &st) < 0 ||
            x.n_messages != y.n_messages || x.n_tools != y.n_tools || strcmp(x.id, y.id) != 0 ||
            x.generation != y.generation)
            abort();
        for (size_t i = 0; i < x.n_messages; i++)
            if (!is_same(x.messages[i], y.messages[i]) ||
                x.sampled[i].n_ids != y.sampled[i].n_ids ||
                x.sampled[i].text.len != y.sampled[i].text.len)
                abort();
        free(bytes);
    }
    if (a.used > a.limit || b.used > b.limit)
        abort();
    de_arena_done(&a);
    de_arena_done(&b);
    return 0;
}
