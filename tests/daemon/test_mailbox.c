/* test_mailbox.c -- the two ways between the loop and the engine thread: order, bounds, wake-ups. */
#include <stdatomic.h>
#include <time.h>

#include "daemon/limits.h"
#include "daemon/mailbox.h"
#include "support/tap.h"

typedef struct numbered {
    dd_batch batch; /* first: a batch is its numbered */
    uint32_t n;
} numbered;

static dd_mailbox box;

static void nap_ms(long ms)
{
    const struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
    (void)nanosleep(&t, NULL);
}

static double now_s(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

TEST(envelopes_come_in_the_order_of_their_first_wish_and_bring_all_of_them)
{
    dd_mail a = { 0 }, b = { 0 };
    uint32_t wishes = 99;
    REQUIRE(dd_mailbox_init(&box, NULL) == 0);
    CHECK(dd_mailbox_take(&box, 0, &wishes) == NULL && wishes == 99);
    dd_mailbox_post(&box, &a, 1, 0);
    dd_mailbox_post(&box, &b, 2, 0);
    dd_mailbox_post(&box, &a, 4, 0);
    dd_mailbox_post(&box, &b, 8, 2); /* 2 was not seen yet: taken back */
    CHECK(dd_mailbox_take(&box, 0, &wishes) == &a);
    CHECK_EQ(wishes, 5);
    dd_mailbox_post(&box, &a, 16, 1); /* behind b now; 1 was seen and cannot be taken back */
    CHECK(dd_mailbox_take(&box, 0, &wishes) == &b);
    CHECK_EQ(wishes, 8);
    CHECK(dd_mailbox_take(&box, 0, &wishes) == &a);
    CHECK_EQ(wishes, 16);
    CHECK(dd_mailbox_take(&box, 0, &wishes) == NULL);
    dd_mailbox_done(&box);
}

TEST(an_envelope_whose_wishes_were_all_taken_back_still_comes_empty)
{
    dd_mail a = { 0 };
    uint32_t wishes = 99;
    REQUIRE(dd_mailbox_init(&box, NULL) == 0);
    dd_mailbox_post(&box, &a, 1, 0);
    dd_mailbox_post(&box, &a, 0, 1);
    CHECK(dd_mailbox_take(&box, 0, &wishes) == &a);
    CHECK_EQ(wishes, 0);
    dd_mailbox_done(&box);
}

TEST(take_waits_as_long_as_it_may)
{
    uint32_t wishes;
    REQUIRE(dd_mailbox_init(&box, NULL) == 0);
    const double start = now_s();
    CHECK(dd_mailbox_take(&box, 30, &wishes) == NULL);
    const double waited = now_s() - start;
    CHECK(waited >= 0.029 && waited < 20);
    dd_mailbox_done(&box);
}

static dd_mail late_mail;

static void *post_late(void *arg)
{
    (void)arg;
    nap_ms(20);
    dd_mailbox_post(&box, &late_mail, 1, 0);
    return NULL;
}

static void *close_late(void *arg)
{
    (void)arg;
    nap_ms(20);
    dd_mailbox_close(&box);
    return NULL;
}

TEST(a_wish_wakes_the_engine)
{
    pthread_t t;
    uint32_t wishes = 0;
    REQUIRE(dd_mailbox_init(&box, NULL) == 0);
    REQUIRE(pthread_create(&t, NULL, post_late, NULL) == 0);
    CHECK(dd_mailbox_take(&box, 50000, &wishes) == &late_mail); /* longer than a test may take */
    CHECK_EQ(wishes, 1);
    (void)pthread_join(t, NULL);
    dd_mailbox_done(&box);
}

TEST(closing_wakes_the_engine_and_loses_no_wish)
{
    pthread_t t;
    dd_mail a = { 0 };
    uint32_t wishes = 0;
    REQUIRE(dd_mailbox_init(&box, NULL) == 0);
    REQUIRE(pthread_create(&t, NULL, close_late, NULL) == 0);
    CHECK(dd_mailbox_take(&box, 50000, &wishes) == NULL);
    (void)pthread_join(t, NULL);
    CHECK(dd_mailbox_is_closed(&box));
    dd_mailbox_post(&box, &a, 2, 0);
    CHECK(dd_mailbox_take(&box, 50000, &wishes) == &a);
    CHECK_EQ(wishes, 2);
    CHECK(dd_mailbox_take(&box, 50000, &wishes) == NULL); /* closed: it does not wait */
    dd_mailbox_done(&box);
}

static numbered batches[DD_BATCHES_HELD + 2];
static atomic_uint n_sent;

static void *send_all(void *arg)
{
    (void)arg;
    for (uint32_t i = 0; i < DD_BATCHES_HELD + 2; i++) {
        batches[i].n = i;
        dd_mailbox_send(&box, &batches[i].batch);
        atomic_fetch_add(&n_sent, 1);
    }
    return NULL;
}

/* Waits until n batches were sent; whether it is so. */
static bool sent(uint32_t n)
{
    for (int i = 0; i < 5000 && atomic_load(&n_sent) < n; i++)
        nap_ms(1);
    nap_ms(20); /* one too many would be there by now */
    return atomic_load(&n_sent) == n;
}

TEST(the_engine_waits_where_too_many_batches_are_under_way)
{
    pthread_t t;
    REQUIRE(dd_mailbox_init(&box, NULL) == 0);
    CHECK(dd_mailbox_receive(&box) == NULL);
    REQUIRE(pthread_create(&t, NULL, send_all, NULL) == 0);
    CHECK(sent(DD_BATCHES_HELD));
    CHECK(dd_mailbox_receive(&box) == &batches[0].batch);
    CHECK(sent(DD_BATCHES_HELD + 1)); /* room for one is room for one */
    for (uint32_t i = 1; i < DD_BATCHES_HELD + 2; i++) {
        dd_batch *b = NULL;
        for (int k = 0; k < 5000 && !(b = dd_mailbox_receive(&box)); k++)
            nap_ms(1);
        CHECK(b == &batches[i].batch);
    }
    (void)pthread_join(t, NULL);
    CHECK(dd_mailbox_receive(&box) == NULL);
    dd_mailbox_done(&box);
}

TEST(closing_lets_the_engine_send_what_it_has)
{
    pthread_t t;
    REQUIRE(dd_mailbox_init(&box, NULL) == 0);
    REQUIRE(pthread_create(&t, NULL, send_all, NULL) == 0);
    CHECK(sent(DD_BATCHES_HELD));
    dd_mailbox_close(&box);
    (void)pthread_join(t, NULL);
    for (uint32_t i = 0; i < DD_BATCHES_HELD + 2; i++) /* none is lost, for somebody frees them */
        CHECK(dd_mailbox_receive(&box) == &batches[i].batch);
    CHECK(dd_mailbox_receive(&box) == NULL);
    dd_mailbox_done(&box);
}

/* Both ways at once, as fast as they go. */
enum { THINGS = 3, ROUNDS = 30000 };
static const uint32_t last_wish = 1u << 31;
static struct {
    dd_mail mail; /* first: an envelope is its thing */
    uint32_t seen;
} things[THINGS];
static numbered many[ROUNDS];

static void *engine(void *arg)
{
    uint32_t n_last = 0, wishes;
    (void)arg;
    for (uint32_t i = 0; i < ROUNDS || n_last < THINGS;) {
        dd_mail *m = dd_mailbox_take(&box, i < ROUNDS ? 0 : 50000, &wishes);
        for (size_t k = 0; m && k < THINGS; k++)
            if (m == &things[k].mail) {
                things[k].seen |= wishes;
                n_last += wishes >> 31;
            }
        if (i < ROUNDS) {
            many[i].n = i;
            dd_mailbox_send(&box, &many[i++].batch);
        }
    }
    return NULL;
}

TEST(nothing_is_lost_or_out_of_order_with_both_at_work)
{
    pthread_t t;
    uint32_t next = 0, posted[THINGS] = { 0 };
    REQUIRE(dd_mailbox_init(&box, NULL) == 0);
    REQUIRE(pthread_create(&t, NULL, engine, NULL) == 0);
    for (uint32_t i = 0; next < ROUNDS; i++) {
        const uint32_t wish = 1u << i % 31, k = i % THINGS;
        if (i < ROUNDS) {
            posted[k] |= wish;
            dd_mailbox_post(&box, &things[k].mail, wish, 0);
        }
        for (const dd_batch *b; (b = dd_mailbox_receive(&box)) != NULL; next++)
            if (((const numbered *)b)->n != next)
                TAP_FAIL("batch %u came as number %u", ((const numbered *)b)->n, next);
        if (i >= ROUNDS)
            nap_ms(1);
    }
    for (size_t k = 0; k < THINGS; k++)
        dd_mailbox_post(&box, &things[k].mail, last_wish, 0);
    (void)pthread_join(t, NULL);
    for (size_t k = 0; k < THINGS; k++)
        CHECK_EQ(things[k].seen, posted[k] | last_wish);
    dd_mailbox_done(&box);
}

static void on_batch(uv_async_t *a)
{
    const dd_batch *b = dd_mailbox_receive(&box);
    CHECK(b == &batches[0].batch);
    uv_close((uv_handle_t *)a, NULL);
}

static void *send_one(void *arg)
{
    (void)arg;
    dd_mailbox_send(&box, &batches[0].batch);
    return NULL;
}

TEST(a_batch_wakes_the_loop)
{
    uv_loop_t loop;
    uv_async_t async;
    pthread_t t;
    REQUIRE(uv_loop_init(&loop) == 0 && uv_async_init(&loop, &async, on_batch) == 0);
    REQUIRE(dd_mailbox_init(&box, &async) == 0);
    REQUIRE(pthread_create(&t, NULL, send_one, NULL) == 0);
    CHECK_EQ(uv_run(&loop, UV_RUN_DEFAULT), 0); /* ends when the handle is closed */
    (void)pthread_join(t, NULL);
    CHECK_EQ(uv_loop_close(&loop), 0);
    dd_mailbox_done(&box);
}
