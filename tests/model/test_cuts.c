/* test_cuts.c -- how a sequence is cut into forwards, and where it lies in memory, on the demo
 * model: the chunked prefill against the recurrence at every position, a cut at every offset, the
 * states behind cuts at multiples of DE_CHUNK, pages in any order and with old contents. */
#include "model/forward.h"
#include "support/tap.h"

enum { MAX_LEN = 400, SEQ_PAGES = 8, SLOTS = 4, CTX = SEQ_PAGES * DE_PAGE };
static const double bound = 1e-5; /* docs/NUMERICS.md: norm of the difference over norm */

typedef struct fixture {
    de_shape shape;
    de_weights *weights;
    de_binding *binding;
    de_model *model;
} fixture;

__attribute__((constructor)) static void slow(void)
{
    tap_timeout_s = 300; /* sanitizers on a busy machine */
}

static bool up(fixture *f, uint32_t threads)
{
    delta_error err = { .text = "memory" };
    *f = (fixture){ .model = NULL };
    const de_model_options o = { .threads = threads,
                                 .n_slots = SLOTS,
                                 .n_pages = SLOTS * SEQ_PAGES,
                                 .max_rows = MAX_LEN,
                                 .max_seqs = SLOTS,
                                 .max_out = MAX_LEN,
                                 .ctx_max = CTX };
    int r = de_shape_read(DEMO_MODEL_DIR, &f->shape, &err);
    if (r == 0)
        r = de_weights_open(DEMO_MODEL_DIR, &f->weights, &err);
    if (r == 0)
        r = de_bind(f->weights, &f->shape, &f->binding, &err);
    if (r == 0)
        r = de_model_open(f->weights, &f->shape, f->binding, &o, &f->model, &err);
    if (r < 0)
        TAP_FAIL("%s", err.text);
    return r == 0;
}

static void down(fixture *f)
{
    de_model_free(f->model);
    de_binding_free(f->binding);
    de_weights_free(f->weights);
}

/* One sequence's part of a batch: tokens [start, start + n) of text `seed`, last n_out with logits */
typedef struct part {
    uint32_t seed, slot, start, n, n_out;
    bool backwards; /* its pages, in falling order */
    const de_batch_mark *marks;
    uint32_t n_marks;
} part;

static uint32_t token(const fixture *f, uint32_t seed, uint32_t at)
{
    uint64_t x = ((uint64_t)seed << 32 | at) * 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    return (uint32_t)(x >> 33) % f->shape.vocab;
}

/* Runs the parts as one batch; logits [sum of n_out, vocab] in order of the parts. */
static int run(const fixture *f, const part *p, uint32_t n_parts, float *logits)
{
    static uint32_t tokens[MAX_LEN + 1], pos[MAX_LEN + 1][3], pages[SLOTS][SEQ_PAGES];
    de_batch_seq seqs[SLOTS];
    de_batch b = { .n_seqs = n_parts, .tokens = tokens, .seqs = seqs };
    delta_error err;
    for (uint32_t i = 0; i < n_parts; i++) {
        for (uint32_t k = 0; k < SEQ_PAGES; k++)
            pages[i][k] = p[i].slot * SEQ_PAGES + (p[i].backwards ? SEQ_PAGES - 1 - k : k);
        seqs[i] = (de_batch_seq){ .row = b.n_rows,
                                  .n_rows = p[i].n,
                                  .start = p[i].start,
                                  .pages = pages[i],
                                  .slot = p[i].slot,
                                  .first_out = b.n_out,
                                  .n_out = p[i].n_out,
                                  .marks = p[i].marks,
                                  .n_marks = p[i].n_marks };
        for (uint32_t t = 0; t < p[i].n; t++, b.n_rows++) {
            tokens[b.n_rows] = token(f, p[i].seed, p[i].start + t);
            for (int axis = 0; axis < 3; axis++)
                pos[b.n_rows][axis] = p[i].start + t;
        }
        b.n_out += p[i].n_out;
    }
    b.pos = (const uint32_t(*)[3])pos;
    return de_forward(f->model, &b, logits, NULL, &err);
}

/* One part alone; start 0 clears the slot. */
static float *alone(const fixture *f, part p)
{
    float *logits = calloc((size_t)p.n_out * f->shape.vocab + 1, sizeof *logits);
    if (p.start == 0)
        de_model_slot_clear(f->model, p.slot);
    if (!logits || run(f, &p, 1, logits) < 0) {
        TAP_FAIL("forward of %u rows at %u", p.n, p.start);
        exit(1);
    }
    return logits;
}

static double relative(const float *a, const float *b, size_t n)
{
    double d = 0, s = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        s += (double)b[i] * b[i];
    }
    return sqrt(d / s);
}

static size_t row_bytes(const fixture *f)
{
    return f->shape.vocab * sizeof(float);
}

/* The chunked form against the recurrence, all positions: what the bound in NUMERICS.md says. */
TEST(chunked_prefill_is_the_recurrence_within_the_bound)
{
    fixture f;
    enum { N = 150 };
    REQUIRE(up(&f, 1));
    const size_t V = f.shape.vocab;
    double worst = 0;
    float *whole = alone(&f, (part){ .seed = 2, .slot = 0, .n = N, .n_out = N });
    for (uint32_t t = 0; t < N; t++) {
        float *step = alone(&f, (part){ .seed = 2, .slot = 1, .start = t, .n = 1, .n_out = 1 });
        const double e = relative(whole + t * V, step, V);
        CHECK_NEAR(e, 0, bound);
        worst = e > worst ? e : worst;
        free(step);
    }
    printf("# largest difference %.3g, bound %.3g\n", worst, bound);
    free(whole);
    down(&f);
}

TEST(a_cut_at_a_multiple_of_the_chunk_changes_no_bit)
{
    fixture f;
    enum { N = 201 };
    REQUIRE(up(&f, 2));
    const size_t bytes = de_model_slot_bytes(f.model), V = f.shape.vocab;
    char *a = malloc(bytes), *b = malloc(bytes);
    REQUIRE(a && b);
    float *whole = alone(&f, (part){ .seed = 3, .slot = 0, .n = N, .n_out = N });
    CHECK_EQ(de_model_slot_save(f.model, 0, a, NULL), 0);
    for (uint32_t cut = DE_CHUNK; cut < N; cut += DE_CHUNK) {
        float *x = alone(&f, (part){ .seed = 3, .slot = 1, .n = cut, .n_out = cut });
        float *y =
            alone(&f, (part){ .seed = 3, .slot = 1, .start = cut, .n = N - cut, .n_out = N - cut });
        CHECK(memcmp(x, whole, cut * row_bytes(&f)) == 0);
        CHECK(memcmp(y, whole + cut * V, (N - cut) * row_bytes(&f)) == 0);
        CHECK_EQ(de_model_slot_save(f.model, 1, b, NULL), 0);
        CHECK(memcmp(a, b, bytes) == 0);
        free(x);
        free(y);
    }
    free(whole);
    free(a);
    free(b);
    down(&f);
}

/* What a mark keeps is the state behind as many tokens, and it costs the other rows no bit. */
TEST(marks_keep_the_states_behind_them)
{
    fixture f;
    enum { N = 201, FIRST = 30 };
    static const de_batch_mark marks[] = { { 64, 1 }, { 192, 2 } };
    REQUIRE(up(&f, 2));
    const size_t bytes = de_model_slot_bytes(f.model);
    char *a = malloc(bytes), *b = malloc(bytes);
    REQUIRE(a && b);
    float *plain[2], *marked[2];
    for (int i = 0; i < 2; i++) { /* in two appends: conv inputs of the one before are needed */
        const part p = {
            .seed = 5, .start = i ? FIRST : 0, .n = i ? N - FIRST : FIRST, .n_out = 1
        };
        part q = p;
        q.marks = marks;
        q.n_marks = i ? 2 : 0;
        plain[i] = alone(&f, p);
        if (i == 0) {
            CHECK_EQ(de_model_slot_copy(f.model, 0, 3, NULL), 0);
            continue;
        }
        CHECK_EQ(de_model_slot_save(f.model, 0, a, NULL), 0);
        CHECK_EQ(de_model_slot_copy(f.model, 3, 0, NULL), 0);
        marked[i] = alone(&f, q);
        CHECK_EQ(de_model_slot_save(f.model, 0, b, NULL), 0);
        CHECK_MEM(a, bytes, b, bytes);
        CHECK_MEM(plain[i], row_bytes(&f), marked[i], row_bytes(&f));
    }
    for (int k = 0; k < 2; k++) {
        CHECK_EQ(de_model_slot_copy(f.model, 3, 0, NULL), 0);
        free(alone(&f, (part){ .seed = 5, .start = FIRST, .n = marks[k].end - FIRST }));
        CHECK_EQ(de_model_slot_save(f.model, 0, a, NULL), 0);
        CHECK_EQ(de_model_slot_save(f.model, marks[k].slot, b, NULL), 0);
        CHECK_MEM(a, bytes, b, bytes);
    }
    /* one row at a time, too */
    free(alone(&f, (part){ .seed = 6, .n = 63 }));
    const de_batch_mark last = { 64, 1 };
    free(alone(&f, (part){ .seed = 6, .start = 63, .n = 1, .marks = &last, .n_marks = 1 }));
    CHECK_EQ(de_model_slot_save(f.model, 0, a, NULL), 0);
    CHECK_EQ(de_model_slot_save(f.model, 1, b, NULL), 0);
    CHECK_MEM(a, bytes, b, bytes);

    static const struct {
        de_batch_mark m[2];
        uint32_t n, n_out;
    } bad[] = {
        { { { 65, 1 } }, 1, 0 },     { { { 256, 1 } }, 1, 0 },           { { { 64, 0 } }, 1, 0 },
        { { { 64, SLOTS } }, 1, 0 }, { { { 64, 1 }, { 64, 2 } }, 2, 0 }, { { { 64, 1 } }, 1, 2 }
    };
    float *logits = calloc(2, row_bytes(&f));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const part p = {
            .seed = 5, .n = N, .n_out = bad[i].n_out, .marks = bad[i].m, .n_marks = bad[i].n
        };
        CHECK_EQ(run(&f, &p, 1, logits), DELTA_EINVALID);
    }
    free(logits);
    free(plain[0]);
    free(plain[1]);
    free(marked[1]);
    free(a);
    free(b);
    down(&f);
}

TEST(a_page_goes_elsewhere_and_back_with_all_it_holds)
{
    fixture f;
    enum { N = 100, MORE = 20 };
    REQUIRE(up(&f, 1));
    float *plain = NULL, *moved = NULL;
    char *page = malloc(de_model_page_bytes(f.model));
    REQUIRE(page);
    for (int i = 0; i < 2; i++) {
        free(alone(&f, (part){ .seed = 5, .n = N }));
        if (i) { /* slot 0 has the pages from 0 on, slot 1 those from SEQ_PAGES on */
            CHECK_EQ(de_model_slot_copy(f.model, 0, 1, NULL), 0);
            CHECK_EQ(de_model_page_save(f.model, 0, page, NULL), 0);
            CHECK_EQ(de_model_page_load(f.model, SEQ_PAGES, page, NULL), 0);
            CHECK_EQ(de_model_page_copy(f.model, 1, SEQ_PAGES + 1, NULL), 0);
            free(alone(&f, (part){ .seed = 9, .slot = 0, .n = N })); /* over the old ones */
        }
        float **to = i ? &moved : &plain;
        *to =
            alone(&f, (part){ .seed = 5, .slot = (uint32_t)i, .start = N, .n = MORE, .n_out = 1 });
    }
    CHECK_MEM(plain, row_bytes(&f), moved, row_bytes(&f));
    free(plain);
    free(moved);
    free(page);
    down(&f);
}

TEST(a_cut_anywhere_in_a_chunk_stays_within_the_bound)
{
    fixture f;
    enum { N = 130 };
    REQUIRE(up(&f, 2));
    float *whole = alone(&f, (part){ .seed = 4, .slot = 0, .n = N, .n_out = 1 });
    for (uint32_t cut = 1; cut < N; cut++) {
        free(alone(&f, (part){ .seed = 4, .slot = 1, .n = cut, .n_out = 0 }));
        float *rest =
            alone(&f, (part){ .seed = 4, .slot = 1, .start = cut, .n = N - cut, .n_out = 1 });
        CHECK_NEAR(relative(rest, whole, f.shape.vocab), 0, bound);
        free(rest);
    }
    free(whole);
    down(&f);
}

TEST(threads_pages_and_slots_change_no_bit)
{
    fixture one, three;
    REQUIRE(up(&one, 1) && up(&three, 3));
    enum { N = 180 };
    float *a = alone(&one, (part){ .seed = 8, .slot = 0, .n = N, .n_out = N });
    float *b = alone(&three, (part){ .seed = 8, .slot = 3, .n = N, .n_out = N, .backwards = true });
    CHECK(memcmp(a, b, N * row_bytes(&one)) == 0);
    free(b);
    /* what a page and a slot held before does not matter */
    b = alone(&three, (part){ .seed = 9, .slot = 0, .n = MAX_LEN, .n_out = 1 });
    free(b);
    b = alone(&three, (part){ .seed = 8, .slot = 0, .n = N, .n_out = N });
    CHECK(memcmp(a, b, N * row_bytes(&one)) == 0);
    free(a);
    free(b);
    down(&one);
    down(&three);
}

/* Rows with logits are gathered into a workspace of max_rows: an earlier forward let b.n_out run
 * past it. */
TEST(more_outputs_than_rows_are_refused)
{
    fixture f;
    REQUIRE(up(&f, 1));
    float *logits = calloc(2 * (size_t)f.shape.vocab, sizeof *logits);
    REQUIRE(logits);
    const uint32_t token_1 = 1, page = 0, pos[1][3] = { { 0 } };
    const de_batch_seq s = { .n_rows = 1, .pages = &page, .n_out = 1 };
    de_batch b = {
        .n_rows = 1, .n_seqs = 1, .n_out = 2, .tokens = &token_1, .pos = pos, .seqs = &s
    };
    delta_error err;
    CHECK_EQ(de_forward(f.model, &b, logits, NULL, &err), DELTA_EINVALID);
    b.n_out = 1;
    CHECK_EQ(de_forward(f.model, &b, logits, NULL, &err), 0);
    free(logits);
    down(&f);
}
