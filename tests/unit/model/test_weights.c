/* test_weights.c -- the directory of shards: what is refused, and that file and tensor are named. */
#include "model/weights.h"

#include <limits.h>
#include <sys/stat.h>
#include <time.h>

#include "checkpoint.h"
#include "support/tap.h"

/* ---- one header, parsed in memory */

static int parse(const char *text, uint64_t data_bytes, size_t *n, delta_error *err)
{
    de_arena names;
    de_tensor *t = NULL;
    *n = 0;
    *err = (delta_error){ 0 };
    de_arena_init(&names, 1 << 20);
    int r = de_weights_parse_header(&names, text, strlen(text), data_bytes, &t, n, err);
    free(t);
    de_arena_done(&names);
    return r;
}

#define T(name, dtype, shape, from, to)                                                            \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to   \
    "]}"

TEST(weights_header_with_sound_tensors_is_taken)
{
    static const struct {
        const char *text;
        uint64_t data_bytes;
        size_t n;
    } cases[] = {
        { "{}", 0, 0 },
        { "{\"__metadata__\":{\"format\":\"pt\"}}      ", 0, 0 },
        { "{" T("a", "F32", "[2,3]", 0, 24) "}", 24, 1 },
        { "{" T("a", "BF16", "[]", 0, 2) "}", 2, 1 },  /* a number */
        { "{" T("a", "U8", "[0,5]", 0, 0) "}", 0, 1 }, /* nothing */
        { "{" T("b", "I64", "[1]", 2, 10) "," T("a", "F16", "[1]", 0, 2) "}", 10, 2 },
        { "{" T("b", "I8", "[1]", 0, 1) "," T("e", "I8", "[0]", 1,
                                              1) "," T("a", "I32", "[1,1,1,1,1]", 1, 5) "}",
          5, 3 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n;
        delta_error err;
        int r = parse(cases[i].text, cases[i].data_bytes, &n, &err);
        if (r < 0)
            TAP_FAIL("case %zu: %s", i, err.text);
        else
            CHECK_EQ(n, cases[i].n);
    }
}

TEST(weights_header_gives_tensors_in_order_of_offset)
{
    static const char text[] =
        "{" T("last", "F32", "[2]", 6, 14) "," T("first", "BF16", "[3]", 0, 6) "}";
    de_arena names;
    de_tensor *t = NULL;
    size_t n = 0;
    delta_error err;
    de_arena_init(&names, 1 << 20);
    REQUIRE(de_weights_parse_header(&names, text, sizeof text - 1, 14, &t, &n, &err) == 0);
    CHECK_EQ(n, 2);
    CHECK_STR(t[0].name, "first");
    CHECK_EQ(t[0].dtype, DE_BF16);
    CHECK_EQ(t[0].rank, 1);
    CHECK_EQ(t[0].dims[0], 3);
    CHECK_STR(t[1].name, "last");
    CHECK_EQ(t[1].offset, 6);
    CHECK_EQ(t[1].bytes, 8);
    free(t);
    de_arena_done(&names);
}

TEST(weights_header_faults_are_refused_with_the_tensor_named)
{
    static const struct {
        const char *text;
        uint64_t data_bytes;
        int code;
        const char *want;
    } cases[] = {
        { "", 0, DELTA_EFORMAT, "does not begin" },
        { " {}", 0, DELTA_EFORMAT, "does not begin" },
        { "[]", 0, DELTA_EFORMAT, "does not begin" },
        { "{", 0, DELTA_EFORMAT, "JSON" },
        { "{}x", 0, DELTA_EFORMAT, "JSON" },
        { "{\"__metadata__\":3}", 0, DELTA_EFORMAT, "__metadata__" },
        { "{\"a\":3}", 0, DELTA_EFORMAT, "tensor a" },
        { "{\"a\":null}", 0, DELTA_EFORMAT, "tensor a" },
        { "{\"\":{}}", 0, DELTA_EFORMAT, "its name has 0 bytes" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, DELTA_EFORMAT, "tensor a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, DELTA_EFORMAT,
          "tensor a: shape" },
        { "{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, DELTA_EFORMAT,
          "tensor a: no dtype" },
        { "{" T("a", "F8_E4M3", "[4]", 0, 4) "}", 4, DELTA_EUNSUPPORTED,
          "tensor a: dtype F8_E4M3 is not read" },
        { "{" T("a", "bf16", "[2]", 0, 4) "}", 4, DELTA_EUNSUPPORTED, "dtype bf16" },
        { "{" T("a", "F32", "[2]", 0, 4) "}", 4, DELTA_EFORMAT,
          "tensor a: shape needs 8 bytes, data_offsets span 4" },
        { "{" T("a", "F32", "[1]", 4, 0) "}", 4, DELTA_EFORMAT, "tensor a: data_offsets" },
        { "{" T("a", "F32", "[1]", 0, 4) "}", 3, DELTA_EFORMAT, "tensor a: data_offsets" },
        { "{" T("a", "F32", "[1]", -4, 0) "}", 3, DELTA_EFORMAT, "tensor a: data_offsets" },
        { "{" T("a", "F32", "[1.0]", 0, 4) "}", 4, DELTA_EFORMAT, "tensor a: impossible shape" },
        { "{" T("a", "F32", "[-1]", 0, 4) "}", 4, DELTA_EFORMAT, "tensor a: impossible shape" },
        { "{" T("a", "F32", "[\"1\"]", 0, 4) "}", 4, DELTA_EFORMAT, "tensor a: impossible shape" },
        { "{" T("a", "F32", "[NaN]", 0, 4) "}", 4, DELTA_EFORMAT, "JSON" },
        { "{" T("a", "F32", "[1,1,1,1,1,1]", 0, 4) "}", 4, DELTA_EFORMAT, "at most 5" },
        { "{" T("a", "F32", "{}", 0, 4) "}", 4, DELTA_EFORMAT, "tensor a: shape" },
        /* 2^62 * 4 and 2^33 * 2^31 * 4 wrap to 0, 18446744073709551616 is 2^64 */
        { "{" T("a", "F32", "[4611686018427387904]", 0, 0) "}", 0, DELTA_EFORMAT, "impossible" },
        { "{" T("a", "F32", "[8589934592,2147483648]", 0, 0) "}", 0, DELTA_EFORMAT, "impossible" },
        { "{" T("a", "I8", "[18446744073709551616]", 0, 0) "}", 0, DELTA_EFORMAT, "impossible" },
        { "{" T("a", "I8", "[1]", 18446744073709551615, 0) "}", 1, DELTA_EFORMAT, "data_offsets" },
        { "{" T("a", "I8", "[1]", 0, 1) "," T("a", "I8", "[1]", 1, 2) "}", 2, DELTA_EFORMAT,
          "a: JSON line 1 column" },
        { "{" T("a", "I8", "[4]", 0, 4) "," T("b", "I8", "[4]", 2, 6) "}", 6, DELTA_EFORMAT,
          "tensor b: its data overlap" },
        { "{" T("a", "I8", "[4]", 0, 4) "," T("b", "I8", "[4]", 0, 4) "}", 4, DELTA_EFORMAT,
          "its data overlap" },
        { "{" T("a", "I8", "[4]", 0, 4) "," T("b", "I8", "[4]", 5, 9) "}", 9, DELTA_EFORMAT,
          "tensor b: its data are preceded by a hole" },
        { "{" T("a", "I8", "[4]", 1, 5) "}", 5, DELTA_EFORMAT, "tensor a: its data are preceded" },
        { "{" T("a", "I8", "[4]", 0, 4) "}", 7, DELTA_EFORMAT, "3 bytes of data belong to no" },
        { "{}", 1, DELTA_EFORMAT, "1 bytes of data belong to no" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n;
        delta_error err;
        int r = parse(cases[i].text, cases[i].data_bytes, &n, &err);
        if (r != cases[i].code || !strstr(err.text, cases[i].want))
            TAP_FAIL("case %zu: %d \"%s\", expected %d and \"%s\"", i, r, err.text, cases[i].code,
                     cases[i].want);
    }
}

TEST(weights_header_names_are_bounded)
{
    char text[600], name[300];
    size_t n;
    delta_error err;
    memset(name, 'n', sizeof name);
    for (int len = 256; len <= 257; len++) {
        (void)snprintf(text, sizeof text,
                       "{\"%.*s\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1]}}", len,
                       name);
        CHECK_EQ(parse(text, 1, &n, &err), len == 256 ? 0 : DELTA_EFORMAT);
    }
}

/* ---- files */

static int open_dir(const ck *c, delta_error *err)
{
    de_weights *w = NULL;
    *err = (delta_error){ 0 };
    int r = de_weights_open(c->dir, &w, err);
    if ((r == 0) != (w != NULL))
        TAP_FAIL("%d and a directory at %p", r, (void *)w);
    de_weights_free(w);
    return r;
}

static void check_refused(const ck *c, int code, const char *want)
{
    delta_error err;
    int r = open_dir(c, &err);
    if (r != code || !strstr(err.text, want))
        TAP_FAIL("%d \"%s\", expected %d and \"%s\"", r, err.text, code, want);
}

/* Two shards of a small model. */
static void small_files(ck *c)
{
    *c = (ck){ 0 };
    ck_model(c, &ck_small);
    ck_write(c);
}

static const char shard1[] = "model-00001-of-00002.safetensors";
static const char shard2[] = "model-00002-of-00002.safetensors";
static const char index_name[] = "model.safetensors.index.json";

TEST(weights_open_finds_every_tensor_and_reads_its_data)
{
    ck c;
    small_files(&c);
    de_weights *w;
    delta_error err;
    REQUIRE(de_weights_open(c.dir, &w, &err) == 0);
    CHECK_EQ(de_weights_count(w), c.n);
    for (size_t i = 0; i < c.n; i++) {
        const de_tensor *t = de_weights_find(w, c.t[i].name);
        REQUIRE(t != NULL);
        CHECK_STR(de_dtype_name(t->dtype), c.t[i].dtype);
        CHECK_EQ(t->rank, c.t[i].rank);
        for (uint32_t k = 0; k < t->rank; k++)
            CHECK_EQ(t->dims[k], c.t[i].dims[k]);
        const char *path = de_weights_shard_path(w, t->shard);
        CHECK(strstr(path, c.t[i].shard ? shard2 : shard1) != NULL);
        int64_t v[2] = { -1, -1 };
        if (t->dtype == DE_I64) {
            CHECK_EQ(de_weights_read(w, t->shard, t->offset, v, sizeof v, &err), 0);
            CHECK(v[0] == c.t[i].data[0] && v[1] == c.t[i].data[1]);
        }
    }
    CHECK(de_weights_find(w, "") == NULL);
    CHECK(de_weights_find(w, "model") == NULL);
    de_weights_free(w);
    ck_done(&c);
}

TEST(weights_read_past_the_end_of_a_file_that_became_shorter_is_an_error)
{
    ck c;
    char path[192], byte;
    small_files(&c);
    de_weights *w;
    delta_error err;
    REQUIRE(de_weights_open(c.dir, &w, &err) == 0);
    ck_file(&c, path, shard1);
    CHECK_EQ(truncate(path, 100), 0);
    CHECK_EQ(de_weights_read(w, 0, 100, &byte, 1, &err), DELTA_EIO);
    CHECK(strstr(err.text, shard1) != NULL);
    de_weights_free(w);
    ck_done(&c);
}

TEST(weights_open_needs_an_index_or_one_file)
{
    ck c = { 0 };
    ck_make_dir(&c);
    check_refused(&c, DELTA_ENOTFOUND, "neither model.safetensors.index.json nor");
    static const char text[] = "{" T("a", "I8", "[1]", 0, 1) "}";
    ck_write_raw(&c, "model.safetensors", text, sizeof text - 1, 1);
    delta_error err;
    CHECK_EQ(open_dir(&c, &err), 0);
    ck_done(&c);
}

TEST(weights_open_names_a_missing_shard)
{
    ck c;
    char path[192];
    small_files(&c);
    ck_file(&c, path, shard2);
    CHECK_EQ(unlink(path), 0);
    check_refused(&c, DELTA_ENOTFOUND, shard2);
    /* a folder, and a FIFO nobody writes to, in its place */
    CHECK_EQ(mkdir(path, 0700), 0);
    check_refused(&c, DELTA_EIO, "not a regular file");
    CHECK_EQ(rmdir(path), 0);
    CHECK_EQ(mkfifo(path, 0600), 0);
    check_refused(&c, DELTA_EIO, "not a regular file");
    ck_done(&c);
}

static void set_length(const ck *c, const char *name, uint64_t len)
{
    char path[192];
    ck_file(c, path, name);
    int fd = open(path, O_WRONLY);
    uint8_t head[8];
    for (int i = 0; i < 8; i++)
        head[i] = (uint8_t)(len >> (8 * i));
    if (fd < 0 || pwrite(fd, head, 8, 0) != 8)
        ck_die(path);
    close(fd);
}

TEST(weights_open_bounds_the_header)
{
    ck c;
    small_files(&c);
    static const uint64_t huge[] = { (16 << 20) + 1, 1ull << 32, INT64_MAX, UINT64_MAX - 7,
                                     UINT64_MAX };
    for (size_t i = 0; i < sizeof huge / sizeof *huge; i++) {
        set_length(&c, shard1, huge[i]);
        check_refused(&c, DELTA_ELIMIT, shard1);
    }
    set_length(&c, shard1, 16 << 20);
    check_refused(&c, DELTA_EFORMAT, "header of 16777216 bytes in a file of");
    set_length(&c, shard1, 0);
    check_refused(&c, DELTA_EFORMAT, shard1);
    ck_done(&c);
}

static void write_index(const ck *c, const char *text)
{
    char path[192];
    ck_file(c, path, index_name);
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0)
        ck_die(path);
}

TEST(weights_open_checks_the_index_against_the_shards)
{
    ck c = { 0 };
    ck_make_dir(&c);
    static const char a[] = "{" T("a", "I8", "[1]", 0, 1) "}";
    static const char b[] = "{" T("b", "I8", "[1]", 0, 1) "," T("c", "I8", "[1]", 1, 2) "}";
    static const char ab[] = "{" T("b", "I8", "[1]", 0, 1) "," T("a", "I8", "[1]", 1, 2) "}";
    ck_write_raw(&c, "1.safetensors", a, sizeof a - 1, 1);
    ck_write_raw(&c, "2.safetensors", b, sizeof b - 1, 2);
    ck_write_raw(&c, "3.safetensors", ab, sizeof ab - 1, 2);
    static const char sound[] = "{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\","
                                "\"c\":\"2.safetensors\"}}";
    write_index(&c, sound);
    delta_error err;
    CHECK_EQ(open_dir(&c, &err), 0);
    CHECK_STR(err.text, "");
    static const struct {
        const char *text, *want;
    } cases[] = {
        { "", "JSON" },
        { "[]", "no weight_map" },
        { "{}", "no weight_map" },
        { "{\"weight_map\":[]}", "no weight_map" },
        { "{\"weight_map\":{\"a\":1}}", "a names no file" },
        { "{\"weight_map\":{\"a\":\"../1.safetensors\"}}", "outside its folder" },
        { "{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "outside its folder" },
        { "{\"weight_map\":{\"a\":\"..\"}}", "outside its folder" },
        { "{\"weight_map\":{\"a\":\"1.safetensors\\u0000x\"}}", "a names no file" },
        { "{\"weight_map\":{\"a\":\"\"}}", "outside its folder" },
        { "{\"weight_map\":{\"a\":\"1.safetensors\",\"a\":\"1.safetensors\"}}", "duplicate" },
        { "{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\"}}",
          "does not list 1 tensors of the shards, first c in 2.safetensors" },
        { "{\"weight_map\":{\"a\":\"1.safetensors\",\"d\":\"1.safetensors\"}}",
          "tensor d is missing in 1.safetensors" },
        { "{\"weight_map\":{\"a\":\"2.safetensors\",\"b\":\"1.safetensors\",\"c\":\"2."
          "safetensors\"}}",
          "is in " },
        { "{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"3.safetensors\"}}",
          "tensor a stands in 1.safetensors too" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_index(&c, cases[i].text);
        check_refused(&c, DELTA_EFORMAT, cases[i].want);
        check_refused(&c, DELTA_EFORMAT, c.dir); /* the file's path */
    }
    /* the exporters' extra shard */
    write_index(&c, sound);
    static const char m[] = "{" T("mtp.norm", "I8", "[1]", 0, 1) "}";
    ck_write_raw(&c, "model_mtp.safetensors", m, sizeof m - 1, 1);
    check_refused(&c, DELTA_EFORMAT, "model_mtp.safetensors: is there, but the index");
    write_index(
        &c, "{\"weight_map\":{\"a\":\"1.safetensors\",\"mtp.norm\":\"model_mtp.safetensors\"}}");
    CHECK_EQ(open_dir(&c, &err), 0);
    ck_done(&c);
}

TEST(weights_open_bounds_the_number_of_shards)
{
    ck c = { 0 };
    char *text, name[32], header[120];
    size_t len;
    ck_make_dir(&c);
    FILE *f = open_memstream(&text, &len);
    REQUIRE(f != NULL);
    fputs("{\"weight_map\":{", f);
    for (int i = 0; i <= 1000; i++) {
        (void)snprintf(name, sizeof name, "%d.safetensors", i);
        int n = snprintf(header, sizeof header,
                         "{\"t%d\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1]}}", i);
        ck_write_raw(&c, name, header, (size_t)n, 1);
        fprintf(f, "%s\"t%d\":\"%s\"", i ? "," : "", i, name);
    }
    fputs("}}", f);
    fclose(f);
    write_index(&c, text);
    check_refused(&c, DELTA_ELIMIT, "more than 1000 shards");
    free(text);
    ck_done(&c);
}

/* ---- damage */

static uint64_t random_state = 88172645463325252u;

static uint64_t random_below(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % n;
}

TEST(weights_open_refuses_a_shard_cut_anywhere)
{
    ck c;
    char path[192];
    struct stat st;
    delta_error err;
    small_files(&c);
    ck_file(&c, path, shard2);
    REQUIRE(stat(path, &st) == 0);
    /* from the back on, so that a cut file need not be written anew */
    uint64_t cuts[1000];
    for (size_t i = 0; i < 1000; i++)
        cuts[i] = i < 200 ? random_below(20000) : random_below((uint64_t)st.st_size);
    for (size_t i = 1; i < 1000; i++)
        for (size_t k = i; k > 0 && cuts[k - 1] < cuts[k]; k--) {
            uint64_t t = cuts[k];
            cuts[k] = cuts[k - 1];
            cuts[k - 1] = t;
        }
    for (size_t i = 0; i < 1000; i++) {
        REQUIRE(truncate(path, (off_t)cuts[i]) == 0);
        int r = open_dir(&c, &err);
        if (r != DELTA_EFORMAT || !strstr(err.text, shard2))
            TAP_FAIL("cut at %llu: %d \"%s\"", (unsigned long long)cuts[i], r, err.text);
    }
    ck_done(&c);
}

TEST(weights_open_refuses_a_longer_shard)
{
    ck c;
    char path[192];
    struct stat st;
    small_files(&c);
    ck_file(&c, path, shard2);
    REQUIRE(stat(path, &st) == 0);
    CHECK_EQ(truncate(path, st.st_size + 1), 0);
    check_refused(&c, DELTA_EFORMAT, "1 bytes of data belong to no tensor");
    ck_done(&c);
}

/* No single bit of a header can flip without being noticed: names are checked against the index,
 * dtypes and dimensions against the offsets, offsets against each other. */
TEST(weights_open_refuses_every_flipped_bit_of_a_header)
{
    ck c;
    char path[192];
    uint8_t head[8];
    delta_error err;
    small_files(&c);
    ck_file(&c, path, shard1);
    int fd = open(path, O_RDWR);
    REQUIRE(fd >= 0 && pread(fd, head, 8, 0) == 8);
    uint64_t len = 0;
    for (int i = 7; i >= 0; i--)
        len = len << 8 | head[i];
    for (int i = 0; i < 2000; i++) {
        const off_t at = (off_t)(i < 64 ? (uint64_t)i / 8 : random_below(8 + len));
        const int bit = i < 64 ? i % 8 : (int)random_below(8);
        uint8_t byte;
        REQUIRE(pread(fd, &byte, 1, at) == 1);
        uint8_t bad = (uint8_t)(byte ^ 1 << bit);
        REQUIRE(pwrite(fd, &bad, 1, at) == 1);
        int r = open_dir(&c, &err);
        if (r >= 0 || !strstr(err.text, c.dir))
            TAP_FAIL("byte %lld %02x -> %02x: %d \"%s\"", (long long)at, byte, bad, r, err.text);
        REQUIRE(pwrite(fd, &byte, 1, at) == 1);
    }
    close(fd);
    CHECK_EQ(open_dir(&c, &err), 0); /* and mended it is sound again */
    ck_done(&c);
}

/* A million tensors of one shard are the limit; the directory must not be quadratic. */
TEST(weights_open_is_linear_in_the_number_of_tensors)
{
    ck c = { 0 };
    delta_error err;
    double seconds[2];
    for (int k = 0; k < 2; k++) {
        const uint32_t n = k ? 100000 : 10000;
        for (uint32_t i = 0; i < n; i++)
            ck_add(&c, "I8", 1, 1, 0, 0, "model.layers.%u.mlp.experts.%u.w", i / 1000, i % 1000);
        ck_write(&c);
        struct timespec a, b;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
        CHECK_EQ(open_dir(&c, &err), 0);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
        seconds[k] = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
        ck_done(&c);
    }
    printf("# 10,000 tensors %.3f s, 100,000 tensors %.3f s\n", seconds[0], seconds[1]);
    CHECK(seconds[1] < 40 * seconds[0] + 0.5);
}

TEST(weights_open_takes_the_demo_model)
{
    de_weights *w = NULL;
    delta_error err = { 0 };
    CHECK_EQ(de_weights_open(DEMO_MODEL_DIR, &w, &err), 0);
    CHECK_STR(err.text, "");
    REQUIRE(w != NULL);
    const de_tensor *t = de_weights_find(w, "model.language_model.embed_tokens.weight");
    REQUIRE(t != NULL);
    CHECK_EQ(t->dtype, DE_BF16);
    CHECK_EQ(t->dims[0], 2048);
    CHECK_EQ(t->dims[1], 256);
    de_weights_free(w);
}
