/* fuzz_weights.c -- the header of a safetensors file: 8 bytes say how much data follow, the rest is
 * the header. What is taken must cover the data exactly, without overlap. */
#include <stdlib.h>
#include <string.h>

#include "model/weights.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint64_t data_bytes;
    if (size < sizeof data_bytes)
        return 0;
    memcpy(&data_bytes, data, sizeof data_bytes);
    const size_t len = size - sizeof data_bytes;
    char *text = malloc(len ? len : 1); /* so that a read beyond the end is seen */
    de_arena names;
    de_tensor *t = NULL;
    size_t n = 0;
    delta_error err = { 0 };
    if (!text)
        return 0;
    if (len)
        memcpy(text, data + sizeof data_bytes, len);
    de_arena_init(&names, 16 << 20);
    if (de_weights_parse_header(&names, text, len, data_bytes, &t, &n, &err) < 0) {
        if (!err.text[0] || strchr(err.text, '\n'))
            abort();
    } else {
        uint64_t at = 0;
        for (size_t i = 0; i < n; i++) {
            uint64_t bytes = de_dtype_bytes(t[i].dtype);
            if (t[i].rank > DE_MAX_RANK || !t[i].name[0] || t[i].offset != at)
                abort();
            for (uint32_t k = 0; k < t[i].rank; k++)
                bytes *= t[i].dims[k]; /* does not wrap: it was checked */
            if (bytes != t[i].bytes || bytes > data_bytes - at)
                abort();
            at += bytes;
        }
        if (at != data_bytes)
            abort();
    }
    free(t);
    de_arena_done(&names);
    free(text);
    return 0;
}
