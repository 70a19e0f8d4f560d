/* fuzz_record.c -- states on disk: any bytes are a record or refused with a reason; what is one is laid out
 * within what a file can hold, and is the same after it was written again. */
#include <stdlib.h>
#include <string.h>

#include "cache/record.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *bytes = malloc(size ? size : 1);
    if (!bytes)
        return 0;
    if (size)
        memcpy(bytes, data, size);
    de_record r;
    delta_error err = { 0 };
    int64_t n = de_record_parse(bytes, size, &r, &err);
    if (n > 0 && (size_t)n <= size)
        abort();
    if (n < 0 && (n != DELTA_EFORMAT || !err.text[0]))
        abort();
    /* Sums are seldom right by chance: those of what says it is a record are made so. */
    if (n < 0 && size >= sizeof r.head) {
        memcpy(&r.head, bytes, sizeof r.head);
        if (de_record_layout(&r) && de_record_meta_bytes(&r) <= size) {
            const uint32_t n_tokens = r.head.end - r.head.from;
            uint32_t *tokens = calloc(n_tokens, sizeof *tokens);
            uint64_t *sums = calloc(r.n_pages + 1, sizeof *sums);
            if (!tokens || !sums)
                abort();
            r.head.kind.name[sizeof r.head.kind.name - 1] = 0;
            r.tokens = tokens;
            r.sums = sums;
            de_record_write(&r, bytes);
            n = de_record_parse(bytes, size, &r, &err);
            if (n != 0)
                abort();
            free(tokens);
            free(sums);
        }
    }
    if (n == 0) {
        const size_t meta = de_record_meta_bytes(&r);
        uint8_t *again = malloc(meta);
        if (!again || meta > size || r.pages_at < meta || r.state_at < r.pages_at ||
            r.whole_bytes < r.state_at)
            abort();
        de_record_write(&r, again);
        if (memcmp(again, bytes, sizeof r.head) != 0)
            abort();
        free(again);
    }
    free(bytes);
    return 0;
}
