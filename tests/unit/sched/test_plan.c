/* The planner against its promises: budget, order, places of cuts, nobody waits for ever. */
#include "support/tap.h"

#include "sched/plan.h"

enum { CUT = 64 };

static de_plan_item item(uint32_t start, uint32_t remaining, uint32_t waited)
{
    return (de_plan_item){
        .start = start, .segment = remaining, .remaining = remaining, .waited = waited
    };
}

TEST(plan_puts_decode_rows_before_prefill)
{
    de_plan_item items[] = { item(0, 1000, 3), item(70, 1, 0), item(500, 1, 0) };
    uint32_t order[3];
    CHECK_EQ(de_plan(items, 3, 256, CUT, order), 3);
    CHECK_EQ(order[0], 1);
    CHECK_EQ(order[1], 2);
    CHECK_EQ(order[2], 0);
    CHECK_EQ(items[0].ret_rows, 192); /* 254 rows are left: cut at 192 */
}

TEST(plan_cuts_at_absolute_multiples_when_start_is_odd)
{
    de_plan_item items[] = { item(70, 500, 0) };
    uint32_t order[1];
    CHECK_EQ(de_plan(items, 1, 100, CUT, order), 1);
    CHECK_EQ(items[0].ret_rows, 128 - 70);
    items[0].segment = 20; /* an append ends there */
    CHECK_EQ(de_plan(items, 1, 100, CUT, order), 1);
    CHECK_EQ(items[0].ret_rows, 20);
}

TEST(plan_gives_nothing_rather_than_a_piece_that_depends_on_load)
{
    de_plan_item items[] = { item(0, 40, 0), item(0, 100, 0) };
    uint32_t order[2];
    CHECK_EQ(de_plan(items, 2, 64, CUT, order), 1);
    CHECK_EQ(items[0].ret_rows, 40);
    CHECK_EQ(items[1].ret_rows, 0);
}

TEST(plan_takes_the_shortest_first_until_the_longest_has_waited)
{
    de_plan_item items[] = { item(0, 640, 0), item(0, 128, 0) };
    uint32_t order[2];
    CHECK_EQ(de_plan(items, 2, 128, CUT, order), 1);
    CHECK_EQ(order[0], 1);
    items[0].waited = 5;
    CHECK_EQ(de_plan(items, 2, 128, CUT, order), 1);
    CHECK_EQ(order[0], 0);
}

TEST(plan_lets_a_patient_prefill_pass_more_streams_than_rows)
{
    de_plan_item items[101];
    uint32_t order[101];
    for (uint32_t i = 0; i < 100; i++)
        items[i] = item(200 + i, 1, 0);
    items[100] = item(0, 64, DE_PLAN_PATIENCE - 1);
    CHECK_EQ(de_plan(items, 101, 64, CUT, order), 64);
    CHECK_EQ(items[100].ret_rows, 0);
    items[100].waited++;
    CHECK_EQ(de_plan(items, 101, 64, CUT, order), 1);
    CHECK_EQ(order[0], 100);
}

/* Pieces that are short of a cut took the rows of the streams. */
TEST(plan_leaves_streams_their_rows_however_long_prefill_has_waited)
{
    enum { STREAMS = 16, PROMPTS = 20 };
    de_plan_item items[STREAMS + PROMPTS];
    uint32_t order[STREAMS + PROMPTS];
    for (uint32_t i = 0; i < STREAMS; i++) {
        items[i] = item(1000, 1 + i % 3, 0);
        items[i].decodes = true; /* up to three rows: a grammar forced two */
    }
    for (uint32_t i = STREAMS; i < STREAMS + PROMPTS; i++)
        items[i] = item(50, 400, 2 * DE_PLAN_PATIENCE);
    (void)de_plan(items, STREAMS + PROMPTS, 31 + CUT, CUT, order);
    for (uint32_t i = 0; i < STREAMS; i++)
        CHECK_EQ(items[i].ret_rows, 1 + i % 3);
}

TEST(plan_takes_the_user_with_less_first_and_the_shortest_of_a_user)
{
    de_plan_item items[] = { item(0, 64, 9), item(0, 640, 0), item(0, 128, 0) };
    uint32_t order[3];
    items[0].user_rows = 1;
    CHECK_EQ(de_plan(items, 3, 192, CUT, order), 2);
    CHECK_EQ(order[0], 2);
    CHECK_EQ(order[1], 1);
    items[0].user_rows = 0;
    CHECK_EQ(de_plan(items, 3, 64, CUT, order), 1);
    CHECK_EQ(order[0], 0);
}

TEST(shares_forget_and_are_bounded)
{
    de_shares s = { 0 };
    uint32_t most = 0, steps = 0;
    for (int i = 0; i < 1000; i++) {
        de_shares_decay(&s);
        de_shares_add(&s, 7, 512);
        most = de_shares_of(&s, 7) > most ? de_shares_of(&s, 7) : most;
    }
    CHECK(most > 7 * 512 && most <= DE_SHARE_STEPS * 512);
    CHECK_EQ(de_shares_of(&s, 8), 0);
    for (; de_shares_of(&s, 7); steps++)
        de_shares_decay(&s);
    CHECK(steps <= DE_SHARE_STEPS * (log(most) + 1));
    for (uint32_t user = 0; user < 2 * DE_SHARE_USERS; user++)
        de_shares_add(&s, user, user < DE_SHARE_USERS ? 1 : 64);
    CHECK_EQ(de_shares_of(&s, 0), 0); /* of too many, those with least are forgotten */
    CHECK_EQ(de_shares_of(&s, 2 * DE_SHARE_USERS - 1), 64);
}

/* Random loads with new short prompts all the time: each step keeps the rules, and each prefill
 * ends within a bound. */
TEST(plan_keeps_its_rules_and_starves_nobody_in_random_loads)
{
    enum { N = 40, STEPS = 20000 };
    de_plan_item items[N];
    uint32_t order[N], age[N], worst = 0;
    uint64_t x = 88172645463325252u;
    for (uint32_t i = 0; i < N; i++) {
        items[i] = item(0, 1, 0);
        age[i] = 0;
    }
    for (int step = 0; step < STEPS; step++) {
        const uint32_t budget = 128;
        const uint32_t n = de_plan(items, N, budget, CUT, order);
        uint32_t sum = 0;
        REQUIRE(n > 0);
        for (uint32_t i = 0; i < n; i++)
            sum += items[order[i]].ret_rows;
        REQUIRE(sum <= budget);
        for (uint32_t i = 0; i < N; i++) {
            de_plan_item *it = &items[i];
            const uint32_t end = it->start + it->ret_rows;
            REQUIRE(it->ret_rows == 0 || it->ret_rows == it->segment || end % CUT == 0);
            it->waited = it->ret_rows ? 0 : it->waited + 1;
            it->start = end;
            it->remaining -= it->ret_rows;
            age[i]++;
            if (it->remaining == 0) {
                worst = age[i] > worst ? age[i] : worst;
                age[i] = 0;
                x ^= x << 13, x ^= x >> 7, x ^= x << 17;
                it->remaining = i == 0 ? 4096 : i % 3 ? 1 : 1 + (uint32_t)(x % 200);
            }
            it->segment = it->remaining;
        }
    }
    /* 4096 tokens are 64 pieces, each waiting at most a few dozen steps. */
    CHECK(worst < 64 * 40);
}

/* A machine whose step takes base + rows * each, and now and then twice that: 16 streams and cold prompts. */
TEST(streams_keep_their_rate_while_prompts_are_read)
{
    enum { STEP = 8192, STREAMS = 16, STEPS = 3000 };
    static const struct {
        double base_ms, row_ms;
    } machines[] = { { 3, 0.03 }, { 20, 0.01 }, { 1, 0.6 }, { 0.1, 0.001 } };
    for (size_t m = 0; m < sizeof machines / sizeof *machines; m++) {
        const double base = machines[m].base_ms, each = machines[m].row_ms, gap = 50;
        de_pace pace = { .gap_ns = 50 * 1000000u };
        uint32_t late = 0, x = 12345;
        double rows_of_all = 0, worst = 0;
        for (int i = 0; i < STEPS; i++) {
            de_plan_item items[STREAMS + 1];
            uint32_t order[STREAMS + 1];
            for (uint32_t k = 0; k < STREAMS; k++)
                items[k] = (de_plan_item){ .start = 1000, .segment = 1, .remaining = 1 };
            items[STREAMS] =
                (de_plan_item){ .start = 0, .segment = 100000, .remaining = 100000, .waited = 0 };
            const uint32_t budget = de_pace_budget(&pace, STREAMS, STEP, CUT);
            CHECK(budget >= STREAMS + CUT && budget <= STEP);
            CHECK_EQ(de_plan(items, STREAMS + 1, budget, CUT, order), STREAMS + 1);
            for (uint32_t k = 0; k < STREAMS; k++)
                CHECK_EQ(items[k].ret_rows, 1);
            const uint32_t rows = items[STREAMS].ret_rows;
            CHECK(rows >= CUT && rows % CUT == 0);
            x = x * 1664525u + 1013904223u;
            const bool slow = x >> 25 == 0; /* 1 of 128 */
            const double ms = (base + rows * each) * (slow ? 2 : 1);
            de_pace_note(&pace, rows, (uint64_t)(ms * 1e6));
            if (i < 20)
                continue; /* it has to learn */
            late += !slow && ms > gap * 1.3;
            worst = ms > worst && !slow ? ms : worst;
            rows_of_all += rows;
        }
        /* as much as the bound leaves, or all that a step takes */
        double most = (gap - base) / each;
        most = most > STEP - STREAMS ? STEP - STREAMS : most < CUT ? CUT : most;
        printf("# base %.1f ms, %.3f ms a row: %.0f rows a step of %.0f that fit, worst %.1f ms\n",
               base, each, rows_of_all / (STEPS - 20), most, worst);
        CHECK(rows_of_all / (STEPS - 20) > most * 0.8 - CUT);
        CHECK_EQ(late, 0);
    }
    /* nobody waits: the whole step; no bound: likewise */
    const de_pace pace = { .gap_ns = 1000, .many = { 200, 200e6 } },
                  none = { .many = { 200, 200e6 } };
    CHECK_EQ(de_pace_budget(&pace, 0, STEP, CUT), STEP);
    CHECK_EQ(de_pace_budget(&none, 5, STEP, CUT), STEP);
    CHECK_EQ(de_pace_budget(&pace, 5, STEP, CUT), CUT + 5);
}

/* Eight short turns come nearly at once: the first alone, the others beside its answer. A step of few rows took 18 ms, nearly all of
 * it for the weights; taken for the price of its rows, it would have spread the others over four steps. */
TEST(pace_knows_that_a_step_of_few_rows_pays_for_the_weights)
{
    enum { CHUNK = 64, ROWS = 8192 };
    const double base = 17, each = 0.03;
    de_pace pace = { .gap_ns = 50 * 1000000u };
    de_pace_note(&pace, ROWS, (uint64_t)((base + ROWS * each) * 1e6));
    de_pace_note(&pace, 34, (uint64_t)((base + 34 * each) * 1e6));
    const uint32_t rows = de_pace_budget(&pace, 1, ROWS, CHUNK) - 1;
    CHECK(rows >= 7 * 34 && base + rows * each <= 51);
    CHECK(rows >= 1000); /* 1,100 fit */
    /* where rows are all the price, few and many say the same */
    de_pace cpu = { .gap_ns = 50 * 1000000u };
    de_pace_note(&cpu, 512, 512 * 300000);
    de_pace_note(&cpu, 64, 64 * 300000);
    CHECK_EQ(de_pace_budget(&cpu, 1, 512, CHUNK), 128 + 1);
    /* two steps that contradict each other leave it sane */
    de_pace odd = { .gap_ns = 50 * 1000000u };
    de_pace_note(&odd, 200, 20 * 1000000);
    de_pace_note(&odd, 100, 90 * 1000000);
    const uint32_t some = de_pace_budget(&odd, 1, ROWS, CHUNK);
    CHECK(some >= CHUNK + 1 && some <= ROWS);
}
