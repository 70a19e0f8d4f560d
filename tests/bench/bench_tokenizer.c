/* bench_tokenizer.c -- bench_tokenizer DIR FILE...: how fast text becomes tokens on one core.
 *
 * DIR holds tokenizer.json; the files are read whole, joined and repeated to at least 8 MB, and
 * encoded 7 times; the median counts. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/file.h"
#include "delta/tokenizer.h"

static double now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
    enum { WANT = 8 << 20, REPEATS = 7 };
    delta_tokenizer *t;
    delta_error err;
    double begin = now(), seconds[REPEATS];
    if (argc < 3) {
        (void)fprintf(stderr, "usage: bench_tokenizer DIR FILE...\n");
        return 64;
    }
    if (delta_tokenizer_open(argv[1], &t, &err) < 0) {
        (void)fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    printf("open: %.0f ms, %u tokens\n", (now() - begin) * 1e3, delta_tokenizer_size(t));
    char *text = NULL;
    size_t len = 0, n_ids = 0;
    while (len < WANT)
        for (int i = 2; i < argc; i++) {
            char *one;
            size_t n;
            if (de_file_read(argv[i], 64 << 20, &one, &n, &err) < 0) {
                (void)fprintf(stderr, "%s\n", err.text);
                return 1;
            }
            char *more = realloc(text, len + n + 1);
            if (!more)
                return 1;
            text = more;
            memcpy(text + len, one, n);
            len += n;
            free(one);
        }
    for (int i = 0; i < REPEATS; i++) {
        uint32_t *ids;
        begin = now();
        if (delta_tokenize(t, text, len, false, &ids, &n_ids, &err) < 0) {
            (void)fprintf(stderr, "%s\n", err.text);
            return 1;
        }
        seconds[i] = now() - begin;
        free(ids);
    }
    qsort(seconds, REPEATS, sizeof *seconds, by_value);
    printf("encode: %.1f MB/s (%.1f .. %.1f of %d), %.1f MB, %.2f bytes a token\n",
           (double)len * 1e-6 / seconds[REPEATS / 2], (double)len * 1e-6 / seconds[REPEATS - 1],
           (double)len * 1e-6 / seconds[0], REPEATS, (double)len * 1e-6,
           (double)len / (double)n_ids);
    free(text);
    delta_tokenizer_free(t);
    return 0;
}
