/* The model on the demo checkpoint: prefill against decode, cuts, batches, borders and slots. That
 * the numbers are right is delta-golden's to show; here they must agree with themselves. */
#include "support/tap.h"

#include "model/forward.h"

enum { CTX = 512, PAGES = 64, MAX_ROWS = 512 };

typedef struct rig {
    de_shape shape;
    de_weights *w;
    de_binding *b;
    de_model *m;
} rig;

static bool rig_open(rig *r, uint32_t threads)
{
    delta_error err = { .text = "" };
    const de_model_options o = { .threads = threads,
                                 .n_slots = 8,
                                 .n_pages = PAGES,
                                 .max_rows = MAX_ROWS,
                                 .max_seqs = 8,
                                 .max_out = 8,
                                 .ctx_max = CTX };
    if (de_shape_read(DEMO_MODEL_DIR, &r->shape, &err) < 0 ||
        de_weights_open(DEMO_MODEL_DIR, &r->w, &err) < 0 ||
        de_bind(r->w, &r->shape, &r->b, &err) < 0 ||
        de_model_open(r->w, &r->shape, r->b, &o, &r->m, &err) < 0) {
        TAP_FAIL("%s", err.text);
        return false;
    }
    return true;
}

static void rig_done(rig *r)
{
    de_model_free(r->m);
    de_binding_free(r->b);
    de_weights_free(r->w);
}

static uint32_t token_at(uint32_t seq, uint32_t i)
{
    return (seq * 7919 + i * 104729 + i * i * 31) % 2012;
}

typedef struct part {
    uint32_t seq, start,
        n; /* tokens [start, start + n) of sequence seq, which owns slot and pages */
} part;

/* One forward over the parts; logits of each part's last row go to out[part]. */
static void forward(rig *r, const part *p, uint32_t n_parts, float *out)
{
    static uint32_t tokens[MAX_ROWS], pos[MAX_ROWS][3], pages[8][CTX / DE_PAGE];
    de_batch_seq seqs[8];
    uint32_t rows = 0;
    for (uint32_t i = 0; i < n_parts; i++) {
        for (uint32_t k = 0; k < CTX / DE_PAGE; k++) /* pages of a sequence are apart in the pool */
            pages[i][k] = (k * 8 + p[i].seq) % PAGES;
        seqs[i] = (de_batch_seq){ .row = rows,
                                  .n_rows = p[i].n,
                                  .start = p[i].start,
                                  .pages = pages[i],
                                  .slot = p[i].seq,
                                  .first_out = i,
                                  .n_out = 1 };
        for (uint32_t k = 0; k < p[i].n; k++, rows++) {
            tokens[rows] = token_at(p[i].seq, p[i].start + k);
            pos[rows][0] = pos[rows][1] = pos[rows][2] = p[i].start + k;
        }
    }
    const de_batch b = { .n_rows = rows,
                         .n_seqs = n_parts,
                         .n_out = n_parts,
                         .tokens = tokens,
                         .pos = (const uint32_t(*)[3])pos,
                         .seqs = seqs };
    delta_error err = { .text = "" };
    if (de_forward(r->m, &b, out, NULL, &err) < 0)
        TAP_FAIL("%s", err.text);
}

static double apart(const float *a, const float *b, size_t n)
{
    double d = 0, s = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        s += (double)b[i] * b[i];
    }
    return sqrt(d / s);
}

/* All of the first n tokens, in one forward. */
static void prefill(rig *r, uint32_t seq, uint32_t n, float *out)
{
    de_model_slot_clear(r->m, seq);
    forward(r, &(part){ seq, 0, n }, 1, out);
}

TEST(prefill_and_decode_agree_at_every_border)
{
    rig r = { 0 };
    REQUIRE(rig_open(&r, 2));
    const uint32_t V = r.shape.vocab;
    float *a = malloc(V * sizeof *a), *b = malloc(V * sizeof *b);
    static const uint32_t lengths[] = { 1,  2,  3,  4,   5,   31,  62,  63,
                                        64, 65, 66, 127, 128, 129, 192, 200 };
    double worst = 0;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        const uint32_t n = lengths[i];
        prefill(&r, 0, n, a);
        forward(&r, &(part){ 0, n, 1 }, 1, a); /* a decode step behind a prefill */
        prefill(&r, 0, n + 1, b);
        worst = fmax(worst, apart(a, b, V));
    }
    de_model_slot_clear(r.m, 0); /* decode only */
    for (uint32_t i = 0; i < 150; i++)
        forward(&r, &(part){ 0, i, 1 }, 1, a);
    prefill(&r, 0, 150, b);
    worst = fmax(worst, apart(a, b, V));
    printf("# largest relative difference %.3g\n", worst);
    CHECK(worst < 1e-5); /* the bound of docs/NUMERICS.md */
    free(a);
    free(b);
    rig_done(&r);
}

TEST(cuts_at_multiples_of_64_change_no_bit)
{
    rig r = { 0 };
    REQUIRE(rig_open(&r, 2));
    const size_t bytes = r.shape.vocab * sizeof(float);
    float *a = malloc(bytes), *b = malloc(bytes);
    prefill(&r, 0, 300, a);
    static const uint32_t cuts[][4] = {
        { 64, 300 }, { 128, 192, 300 }, { 256, 300 }, { 64, 128, 192, 300 }
    };
    for (size_t i = 0; i < 4; i++) {
        uint32_t at = 0;
        de_model_slot_clear(r.m, 0);
        for (size_t k = 0; k < 4 && at < 300; k++) {
            forward(&r, &(part){ 0, at, cuts[i][k] - at }, 1, b);
            at = cuts[i][k];
        }
        CHECK(memcmp(a, b, bytes) == 0);
    }
    free(a);
    free(b);
    rig_done(&r);
}

TEST(batch_mates_and_threads_change_no_bit)
{
    rig one = { 0 }, r = { 0 };
    REQUIRE(rig_open(&one, 1) && rig_open(&r, 3));
    const uint32_t V = r.shape.vocab;
    float *alone = malloc(6 * V * sizeof *alone), *together = malloc(6 * V * sizeof *together);
    /* three prefills of odd lengths and three decodes, first one by one on one thread */
    static const uint32_t before[6] = { 0, 64, 128, 100, 77, 1 }, n[6] = { 33, 70, 5, 1, 1, 1 };
    for (uint32_t i = 0; i < 6; i++) {
        de_model_slot_clear(one.m, i);
        de_model_slot_clear(r.m, i);
        if (before[i]) {
            forward(&one, &(part){ i, 0, before[i] }, 1, alone);
            forward(&r, &(part){ i, 0, before[i] }, 1, alone);
        }
    }
    part p[6];
    for (uint32_t i = 0; i < 6; i++) {
        p[i] = (part){ i, before[i], n[i] };
        forward(&one, &p[i], 1, alone + (size_t)i * V);
    }
    forward(&r, p, 6, together);
    CHECK(memcmp(alone, together, 6 * V * sizeof *alone) == 0);
    free(alone);
    free(together);
    rig_done(&one);
    rig_done(&r);
}

TEST(a_restored_slot_goes_on_with_the_same_bits)
{
    rig r = { 0 };
    REQUIRE(rig_open(&r, 2));
    const size_t bytes = r.shape.vocab * sizeof(float);
    float *a = malloc(bytes), *b = malloc(bytes);
    void *kept = malloc(de_model_slot_bytes(r.m));
    prefill(&r, 0, 90, a);
    CHECK_EQ(de_model_slot_save(r.m, 0, kept, NULL), 0);
    forward(&r, &(part){ 0, 90, 20 }, 1, a);
    CHECK_EQ(de_model_slot_load(r.m, 0, kept, NULL), 0); /* the pages before are as they were */
    forward(&r, &(part){ 0, 90, 20 }, 1, b);
    CHECK(memcmp(a, b, bytes) == 0);
    free(a);
    free(b);
    free(kept);
    rig_done(&r);
}

TEST(forward_refuses_batches_out_of_range)
{
    rig r = { 0 };
    REQUIRE(rig_open(&r, 1));
    uint32_t token = r.shape.vocab, page = 0;
    const uint32_t pos[1][3] = { { 0 } };
    de_batch_seq seq = { .n_rows = 1, .pages = &page, .n_out = 1 };
    de_batch b = {
        .n_rows = 1, .n_seqs = 1, .n_out = 1, .tokens = &token, .pos = pos, .seqs = &seq
    };
    float *out = malloc(r.shape.vocab * sizeof *out);
    CHECK_EQ(de_forward(r.m, &b, out, NULL, NULL), DELTA_EINVALID); /* token */
    token = 1;
    page = PAGES;
    CHECK_EQ(de_forward(r.m, &b, out, NULL, NULL), DELTA_EINVALID); /* page */
    page = 0;
    seq.slot = 8;
    CHECK_EQ(de_forward(r.m, &b, out, NULL, NULL), DELTA_EINVALID); /* slot */
    seq.slot = 0;
    seq.start = CTX;
    CHECK_EQ(de_forward(r.m, &b, out, NULL, NULL), DELTA_EINVALID); /* position */
    seq.start = 0;
    CHECK_EQ(de_forward(r.m, &b, out, NULL, NULL), 0);
    free(out);
    rig_done(&r);
}
