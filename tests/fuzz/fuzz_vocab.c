/* fuzz_vocab.c -- any bytes as tokenizer.json, and behind a NUL as tokenizer_config.json: refused with
 * a reason, or a tokenizer whose ids stay below its size and whose table of tokens can be read. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "delta/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char dir[] = "/tmp/fuzz-vocab-XXXXXX";

static void name(char path[64], const char *file)
{
    (void)snprintf(path, 64, "%s/%s", dir, file);
}

static void write_file(const char *file, const uint8_t *p, size_t len)
{
    char path[64];
    name(path, file);
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, p, len) != (ssize_t)len)
        abort();
    (void)close(fd);
}

static void remove_files(void)
{
    static const char *const files[] = { "tokenizer.json", "tokenizer_config.json" };
    char path[64];
    for (size_t i = 0; i < 2; i++) {
        name(path, files[i]);
        (void)unlink(path);
    }
    (void)rmdir(dir);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool is_ready;
    if (!is_ready) {
        if (!mkdtemp(dir) || atexit(remove_files) != 0)
            abort();
        is_ready = true;
    }
    const uint8_t *nul = size ? memchr(data, 0, size) : NULL;
    const size_t len = nul ? (size_t)(nul - data) : size;
    write_file("tokenizer.json", data, len);
    write_file("tokenizer_config.json", nul ? nul + 1 : (const uint8_t *)"{}",
               nul ? size - len - 1 : 2);
    delta_tokenizer *t = NULL;
    delta_error err = { 0 };
    const int e = delta_tokenizer_open(dir, &t, &err);
    if (e < 0) {
        if (t || err.code != e || !err.text[0])
            abort();
        return 0;
    }
    static const char text[] = "the <|im_end|> 12\n \xe4\xbd\xa0 e\xcc\x81<think>a";
    const uint32_t n_ids = delta_tokenizer_size(t);
    uint32_t *ids = NULL;
    size_t n, out_len;
    char *out = NULL;
    for (uint32_t id = 0; id < n_ids; id++) {
        size_t k = 0;
        const uint8_t *p = delta_token_bytes(t, id, &k);
        if ((p == NULL) != (delta_token_kind(t, id) == DELTA_TOKEN_NONE))
            abort();
        volatile uint8_t last = p && k ? p[k - 1] : 0; /* the sanitizer sees whether it is there */
        (void)last;
    }
    if (delta_tokenize(t, text, sizeof text - 1, false, &ids, &n, &err) == 0) {
        for (size_t i = 0; i < n; i++)
            if (ids[i] >= n_ids)
                abort();
        if (delta_detokenize(t, ids, n, false, &out, &out_len, &err) < 0)
            abort();
    }
    free(out);
    free(ids);
    delta_tokenizer_free(t);
    return 0;
}
