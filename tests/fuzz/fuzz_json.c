/* fuzz_json.c -- the JSON reader: any bytes; what it takes must write and read back the same. */
#include <stdlib.h>
#include <string.h>

#include "base/json.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool same(const de_json *a, const de_json *b, int depth)
{
    if (depth > DE_JSON_DEPTH)
        abort();
    if (a->kind != b->kind || a->n != b->n || a->key_len != b->key_len ||
        (a->key_len && memcmp(a->key, b->key, a->key_len) != 0))
        return false;
    if (a->kind == DE_JSON_NUMBER || a->kind == DE_JSON_STRING)
        return a->text[a->n] == 0 && memcmp(a->text, b->text, a->n) == 0;
    const de_json *x = a->child, *y = b->child;
    uint32_t n = 0;
    for (; x && y; x = x->next, y = y->next, n++)
        if (!same(x, y, depth + 1))
            return false;
    return !x && !y && (a->kind < DE_JSON_ARRAY || n == a->n);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    de_arena arena;
    de_json *v, *again;
    delta_error err = { 0 };
    char *copy = malloc(size ? size : 1); /* so that a read beyond the end is seen */
    if (!copy)
        return 0;
    if (size)
        memcpy(copy, data, size);
    de_arena_init(&arena, 8 << 20);
    if (de_json_parse(&arena, copy, size, &v, &err) < 0) {
        if (!err.text[0] || strchr(err.text, '\n'))
            abort();
    } else {
        if (v->begin > v->end || v->end > size)
            abort();
        for (int compact = 0; compact < 2; compact++) {
            de_text t = { 0 };
            de_json_write(&t, v, compact);
            if (t.failed)
                abort();
            if (de_json_parse(&arena, t.p, t.len, &again, &err) < 0) {
                /* 1e999 is JSON, but Python reads and writes Infinity, which is not */
                if (err.code != DELTA_ENOMEM && (compact || !strstr(t.p, "Infinity")))
                    abort();
            } else if (compact && !same(v, again, 0)) { /* else numbers are respelled */
                abort();
            }
            de_text_done(&t);
        }
    }
    de_arena_done(&arena);
    free(copy);
    return 0;
}
