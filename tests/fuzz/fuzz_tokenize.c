/* fuzz_tokenize.c -- any text through the demo tokenizer: ids stay below the size, decoding gives
 * valid UTF-8, and text without added tokens survives the round trip up to NFC (checked where it
 * is ASCII, which NFC leaves alone). */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "delta/tokenizer.h"
#include "tokenizer/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static delta_tokenizer *t;
    delta_error err;
    if (!t && delta_tokenizer_open(FUZZ_MODEL_DIR, &t, &err) < 0)
        abort();
    if (size < 1)
        return 0;
    const bool plain = data[0] & 1;
    const char *text = (const char *)data + 1;
    const size_t len = size - 1;
    uint32_t *ids;
    size_t n, out_len;
    char *out;
    if (delta_tokenize(t, text, len, plain, &ids, &n, &err) < 0)
        return 0;
    bool ascii = true;
    for (size_t i = 0; i < len; i++)
        ascii &= (uint8_t)text[i] < 0x80;
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= delta_tokenizer_size(t))
            abort();
    if (delta_detokenize(t, ids, n, false, &out, &out_len, &err) < 0)
        abort();
    if (ascii && (out_len != len || memcmp(out, text, len) != 0))
        abort();
    for (size_t i = 0; i < out_len;) {
        const int k = de_utf8_look((const uint8_t *)out + i, out_len - i);
        if (k <= 0)
            abort();
        i += (size_t)k;
    }
    free(out);
    free(ids);
    return 0;
}
