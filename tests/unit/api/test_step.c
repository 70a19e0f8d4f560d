/* Engine, sessions and steps over a model and a tokenizer of a few lines (support/toy_engine.h). */
#include "support/toy_engine.h"

TEST(open_reports_the_checkpoint)
{
    delta_engine *e = open_engine(4, 4096, 128);
    const delta_engine_info *i = delta_engine_info_get(e);
    CHECK_STR(i->model_name, "w8a16");
    CHECK_STR(i->backend, "cpu");
    CHECK_EQ(i->n_vocab, VOCAB);
    CHECK_EQ(i->n_tokens, TOKENS);
    CHECK_EQ(i->n_eos_ids, 2);
    CHECK_EQ(i->eos_ids[0], 2014);
    CHECK_EQ(i->eos_ids[1], 2012);
    CHECK_NEAR((double)i->sampling_plain.temperature, 0.6, 1e-6);
    CHECK(i->template_known && strlen(i->template_sha256) == 64);
    CHECK_EQ(i->ctx_max, 4096); /* no longer than all pages */
    delta_engine_free(e);
}

/* The pool of pages where nothing says how large it is to be. */
TEST(the_default_pool_holds_one_long_session_or_all_at_8192)
{
    delta_engine_stats st;
    delta_engine *e = open_engine(0, 0, 64);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(delta_engine_info_get(e)->max_sessions, 16);
    CHECK_EQ(delta_engine_info_get(e)->ctx_max, 32768);
    CHECK_EQ(st.pages_total, 16 * 8192 / 64);
    delta_engine_free(e);
    e = open_engine(1, 0, 64);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_total, 32768 / 64);
    delta_engine_free(e);
}

/* What a session of one token says under a budget, told `text` by the model. */
static void say_within(const char *text, uint32_t budget, bool logprobs, result *x)
{
    delta_engine *e = open_engine(2, 4096, 64);
    delta_session *s = new_session(e, 600, x);
    delta_sampling p = greedy;
    p.logprobs = logprobs;
    memset(script, 0, sizeof script);
    say_text(1, text);
    append_count(s, 1, 1);
    const delta_guide g = { .thinking = true, .has_budget = true, .budget_tokens = budget };
    CHECK_EQ(delta_session_guide(s, &g, NULL), 0);
    CHECK_EQ(delta_session_generate(s, &p, &(delta_stopping){ .max_tokens = 60 }, NULL), 0);
    CHECK_EQ(delta_session_guide(s, &g, NULL), DELTA_ESTATE);
    run(e, s);
    x->text[x->len] = '\0';
    CHECK_EQ(x->n, 60);
    delta_session_free(s);
    delta_engine_free(e);
}

TEST(a_budget_closes_reasoning)
{
    static result x, y;
    say_within("let me think about it", 6, false, &x);
    CHECK(strncmp(x.text, "let me\n</think>\n\n", 17) == 0);
    /* The same tokens where each of them wants its log probability, one a step. */
    say_within("let me think about it", 6, true, &y);
    CHECK(memcmp(x.ids, y.ids, sizeof x.ids[0] * 10) == 0);
    CHECK(isfinite(y.logprobs[7]) && isfinite(y.logprobs[8]));
    say_within("let me\nthink about it", 7, false, &x);
    CHECK(strncmp(x.text, "let me\n</think>\n\n", 17) == 0);
    say_within("let me think about it", 0, false, &x);
    CHECK(strncmp(x.text, "\n</think>\n\n", 11) == 0);
    /* Not inside a character. */
    say_within("1234\xc3\xa4", 5, false, &x);
    CHECK(strncmp(x.text, "1234\xc3\xa4\n</think>\n\n", 17) == 0);
    /* Not inside a call; but a mention of the tag is no call. */
    say_within("<tool_call>\n<function=f>\n</function>\n</tool_call> and", 20, false, &x);
    CHECK(strstr(x.text, "</tool_call>\n</think>\n\n") != NULL);
    say_within("<tool_call><tool_call><function=f></function></tool_call>", 30, false, &x);
    CHECK(strstr(x.text, "</tool_call>\n</think>") != NULL);
    say_within("a <tool_call> tag is what I write", 16, false, &x);
    CHECK(strncmp(x.text, "a <tool_call> ta\n</think>\n\n", 27) == 0);
}

TEST(a_budget_ends_with_its_generation)
{
    static result x;
    delta_engine *e = open_engine(2, 4096, 64);
    delta_session *s = new_session(e, 600, &x);
    const delta_guide g = { .thinking = true, .has_budget = true, .budget_tokens = 3 };
    memset(script, 0, sizeof script);
    say_text(1, "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz");
    append_count(s, 1, 1);
    CHECK_EQ(delta_session_guide(s, &g, NULL), 0);
    generate(s, 5); /* ends among the forced tokens */
    run(e, s);
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_EQ(x.n_generated, 5);
    x.finished = false;
    generate(s, 10);
    run(e, s);
    x.text[x.len] = '\0';
    CHECK_STR(x.text, "abc\n</think>fghijklmno");
    /* The model closes in time: nothing is added. */
    result y;
    delta_session *t = new_session(e, 600, &y);
    memset(script, 0, sizeof script);
    say_text(1, "ab");
    script[3] = CLOSE;
    say_text(4, "cdefghijklmno");
    append_count(t, 1, 1);
    CHECK_EQ(delta_session_guide(t, &g, NULL), 0);
    generate(t, 10);
    run(e, t);
    y.text[y.len] = '\0';
    CHECK_STR(y.text, "ab</think>cdefghi");
    delta_session_free(s);
    delta_session_free(t);
    delta_engine_free(e);
}

/* A generation that gets its room as it goes, and leaves the device twice, says what one says that has all at once. */
TEST(a_generation_grows_and_is_parked_in_the_middle)
{
    static result x, y;
    const delta_event *events;
    size_t n_events;
    delta_engine *e = open_engine(2, 4096, 64);
    delta_session *s = new_session(e, 600, &x);
    append_count(s, 150, 1);
    generate(s, 200);
    run(e, s);
    CHECK_EQ(x.n, 200);
    delta_session_free(s);

    s = new_session(e, 160, &y);
    append_count(s, 150, 1);
    delta_session_set_limit(s, 350);
    CHECK_EQ(delta_session_generate(s, &greedy, &(delta_stopping){ .max_tokens = 300 }, NULL), 0);
    uint32_t grown = 0, parked = 0;
    for (int i = 0; i < 2000 && delta_session_busy(s); i++) {
        const uint32_t needs = delta_session_short(s), had = y.n;
        if (needs) {
            CHECK_EQ(step(e), 0); /* it waits */
            CHECK_EQ(y.n, had);
            CHECK_EQ(delta_session_reserve(s, needs, NULL), 0);
            CHECK_EQ(delta_session_short(s), 0);
            grown++;
        }
        if ((y.n == 3 && parked == 0) || (y.n == 90 && parked == 1)) {
            delta_session_park(s);
            parked++;
            CHECK_EQ(step(e), 0);
            CHECK(delta_session_busy(s) && !delta_session_resident(s));
            y.prefill_done = 0;
            CHECK_EQ(delta_session_reserve(s, 150 + y.n, NULL), 0);
            CHECK_EQ(delta_session_computed(s),
                     150 + y.n - 1); /* nothing of it is computed again */
            continue;
        }
        CHECK(step(e) >= 0);
    }
    CHECK(grown > 5);
    CHECK_EQ(parked, 2);
    CHECK_EQ(y.prefill_done, 0); /* no word of a prompt in the middle of an answer */
    CHECK_EQ(y.reason, DELTA_FINISH_LENGTH);
    CHECK_EQ(y.n, 200);
    CHECK_MEM(y.ids, 200 * sizeof *y.ids, x.ids, 200 * sizeof *x.ids);
    CHECK_EQ(y.n_prompt, 150);
    CHECK_EQ(y.n_generated, 200);
    CHECK_EQ(y.n_cached, 0); /* and not what it found of its own */

    /* One that is away can be ended there. */
    delta_session_abort(s, &events, &n_events);
    CHECK_EQ(n_events, 0);
    y.finished = false;
    append_count(s, 5, 7);
    delta_session_set_limit(s, 400);
    CHECK_EQ(delta_session_reserve(s, 380, NULL), 0);
    generate(s, 30);
    while (y.n < 204)
        CHECK(step(e) >= 0);
    delta_session_park(s);
    delta_session_abort(s, &events, &n_events);
    note_events(events, n_events);
    CHECK(y.finished);
    CHECK_EQ(y.reason, DELTA_FINISH_CANCELLED);
    CHECK_EQ(y.n_generated, 4);
    size_t n = 0;
    (void)delta_session_tokens(s, &n);
    CHECK_EQ(n, 350 + 5 + 4);
    CHECK(!delta_session_busy(s));
    delta_session_free(s);
    delta_engine_free(e);
}

TEST(open_refuses_options_that_cannot_be)
{
    const struct {
        delta_engine_options o;
        int code;
    } cases[] = {
        { { .model_dir = NULL }, DELTA_EINVALID },
        { { .model_dir = "/nowhere" }, DELTA_ENOTFOUND },
        { { .model_dir = DEMO_MODEL_DIR, .backend = DELTA_BACKEND_CUDA }, DELTA_EUNSUPPORTED },
        { { .model_dir = DEMO_MODEL_DIR, .max_sessions = 1025 }, DELTA_EINVALID },
        { { .model_dir = DEMO_MODEL_DIR, .step_tokens = 63 }, DELTA_EINVALID },
        { { .model_dir = DEMO_MODEL_DIR, .ctx_max = 1u << 30 }, DELTA_EINVALID },
        { { .model_dir = DEMO_MODEL_DIR, .kv_tokens = 1ull << 36 }, DELTA_ENOMEM },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        delta_engine *e = NULL;
        delta_error err = { 0 };
        CHECK_EQ(delta_engine_open(&cases[i].o, &e, &err), cases[i].code);
        CHECK(e == NULL && err.text[0]);
    }
}

TEST(a_session_that_finds_no_seat_takes_nothing)
{
    delta_engine *e = open_engine(1, 1024, 64);
    result x, y;
    delta_session *a = new_session(e, 100, &x), *b = NULL;
    CHECK_EQ(delta_session_new(e, 0, &y, &b, NULL), 0);
    CHECK_EQ(delta_session_reserve(b, 100, NULL), DELTA_EBUSY);
    delta_engine_stats st;
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_used, 2);
    CHECK_EQ(st.sessions_used, 1);
    CHECK_EQ(delta_session_reserve(a, 1025, NULL), DELTA_EINVALID);
    CHECK_EQ(delta_session_reserve(a, 1024, NULL), 0);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_used, 16);
    delta_session_free(a);
    CHECK_EQ(delta_session_reserve(b, 100, NULL), 0);
    delta_session_free(b);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_used + st.sessions_used, 0);
    delta_engine_free(e);
}

/* Sixteen sessions at once, in any order and with any size of step, say what each says alone. */
TEST(sessions_do_not_depend_on_load)
{
    enum { N = 16 };
    static result alone[N], x[N];
    for (int round = 0; round < 5; round++) {
        static const uint32_t steps[] = { 512, 64, 100, 256, 64 };
        delta_engine *e = open_engine(N, 32768, steps[round]);
        delta_session *s[N];
        for (uint32_t k = 0; k < N; k++) {
            const uint32_t i = round % 2 ? N - 1 - k : k;
            delta_sampling p = i % 2 ? greedy : delta_sampling_default(true);
            p.seed = i;
            p.logprobs = true;
            p.presence_penalty = i % 3 == 0 ? 0.5f : 0;
            result *r = round ? &x[i] : &alone[i];
            s[i] = new_session(e, 1200, r);
            append_count(s[i], 1 + i * 61, i);
            for (uint32_t k2 = 0; k2 < 3 && round > 1; k2++)
                (void)step(e); /* the first append is computed, or not, or in part */
            append_count(s[i], 30 + i, i + 1); /* a second append: a cut off 64 */
            CHECK_EQ(delta_session_generate(s[i], &p, &(delta_stopping){ .max_tokens = 20 + i * 2 },
                                            NULL),
                     0);
            for (uint32_t k2 = 0; k2 < i % 5 && round > 2; k2++)
                (void)step(e); /* joins while others run */
            if (round == 0) {
                run(e, s[i]);
                delta_session_free(s[i]);
            }
        }
        for (uint32_t i = 0; i < N && round; i++) {
            run(e, s[i]);
            CHECK(x[i].finished && x[i].reason == alone[i].reason);
            CHECK_EQ(x[i].n, alone[i].n);
            CHECK(memcmp(x[i].ids, alone[i].ids, sizeof x[i].ids) == 0);
            CHECK(memcmp(x[i].logprobs, alone[i].logprobs, sizeof x[i].logprobs) == 0);
            delta_session_free(s[i]);
        }
        delta_engine_stats st;
        delta_engine_stats_get(e, &st);
        CHECK_EQ(st.pages_used + st.sessions_used, 0);
        delta_engine_free(e);
    }
}

TEST(generate_after_a_finished_prefill_needs_no_forward_and_says_the_same)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x, y;
    delta_session *a = new_session(e, 400, &x), *b = new_session(e, 400, &y);
    append_count(a, 150, 3);
    run(e, a);
    CHECK_EQ(x.prefill_done, 150);
    CHECK_EQ(x.prefill_total, 150);
    CHECK_EQ(delta_session_computed(a), 150);
    const uint32_t before = n_forwards;
    generate(a, 5);
    (void)step(e);
    CHECK_EQ(n_forwards, before);
    CHECK_EQ(x.n, 1);
    run(e, a);
    append_count(b, 150, 3);
    generate(b, 5);
    run(e, b);
    CHECK_EQ(x.n, 5);
    CHECK(memcmp(x.ids, y.ids, sizeof x.ids) == 0);
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_EQ(delta_session_computed(a), 154); /* the last one waits */
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

TEST(turns_go_on_where_the_last_ended)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x, y;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    generate(a, 5);
    run(e, a);
    memset(&x, 0, sizeof x);
    append_count(a, 10, 4);
    run(e, a);
    CHECK(!x.finished);
    CHECK_EQ(x.prefill_total, 10);
    CHECK_EQ(x.prefill_done, 10);
    generate(a, 5);
    run(e, a);
    CHECK_EQ(x.n_prompt, 25);
    CHECK_EQ(x.n_cached, 25); /* it was computed before the generation was asked for */
    CHECK_EQ(x.n_generated, 5);
    memset(&x, 0, sizeof x);
    generate(a, 3); /* without an append */
    run(e, a);
    CHECK_EQ(x.n, 3);
    size_t n;
    (void)delta_session_tokens(a, &n);
    CHECK_EQ(n, 33);
    (void)y;
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(stop_ids_end_a_turn_and_stay_in_the_timeline_without_text)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    say(10, (const uint32_t[]){ 'a', 'b', 0xc3, EOS }, 4);
    const uint32_t id = EOS;
    delta_stopping st = { .max_tokens = 50, .ids = &id, .n_ids = 1 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.reason, DELTA_FINISH_STOP_ID);
    CHECK_EQ(x.stop, EOS);
    CHECK_EQ(x.n_generated, 4);
    CHECK_MEM(x.text, x.len, "ab\xef\xbf\xbd", 5); /* half a character was left */
    size_t n;
    CHECK_EQ(delta_session_tokens(a, &n)[13], EOS);
    CHECK_EQ(n, 14);
    /* not before min_tokens */
    memset(&x, 0, sizeof x);
    say(14, (const uint32_t[]){ EOS, EOS, EOS }, 3);
    st.min_tokens = 2;
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.n_generated, 3);
    CHECK(x.ids[0] != EOS && x.ids[1] != EOS && x.ids[2] == EOS);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(stop_strings_cut_the_text_across_tokens)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    say_text(10, "one\ntwo\n\nthree");
    const delta_stop_string strings[] = { { "zzz", 3 }, { "\n\nt", 3 } };
    delta_stopping st = { .max_tokens = 50, .strings = strings, .n_strings = 2 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.reason, DELTA_FINISH_STOP_STRING);
    CHECK_EQ(x.stop, 1);
    CHECK_MEM(x.text, x.len, "one\ntwo", 7);
    CHECK_EQ(x.n, 10);
    /* what is held comes out when the tokens run out */
    memset(&x, 0, sizeof x);
    say_text(20, "x\n\n");
    st.max_tokens = 3;
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_MEM(x.text, x.len, "x\n\n", 3);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(added_tokens_are_pieces_of_their_own)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    say(10, (const uint32_t[]){ 'a', TAG, 0xc3, TAG, '<', TAG, 'b' }, 7);
    const delta_stop_string string = { "<b", 2 };
    delta_stopping st = { .max_tokens = 7, .strings = &string, .n_strings = 1 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.n_added, 3);
    CHECK_MEM(x.text, x.len, "a<tag>\xef\xbf\xbd<tag><<tag>b", 21);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(cancel_in_a_step_ends_at_its_end_and_keeps_what_was_sampled)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    generate(a, 50);
    (void)step(e);
    (void)step(e);
    CHECK_EQ(x.n, 2);
    cancel_in_forward = a;
    (void)step(e);
    cancel_in_forward = NULL;
    CHECK(x.finished && x.reason == DELTA_FINISH_CANCELLED);
    CHECK_EQ(x.n, 2);
    CHECK_EQ(x.n_generated, 2);
    size_t n;
    (void)delta_session_tokens(a, &n);
    CHECK_EQ(n, 12);
    /* an idle session ignores it, and goes on as if nothing had been */
    delta_session_cancel(a);
    CHECK_EQ(step(e), 0);
    memset(&x, 0, sizeof x);
    generate(a, 4);
    run(e, a);
    CHECK_EQ(x.n, 4);
    static result y;
    delta_session *b = new_session(e, 400, &y);
    append_count(b, 10, 3);
    generate(b, 6);
    run(e, b);
    CHECK(memcmp(y.ids + 2, x.ids, 4 * sizeof *x.ids) == 0);
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

TEST(cancelled_prefill_drops_what_is_not_computed)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x;
    delta_session *a = new_session(e, 1000, &x);
    append_count(a, 300, 3);
    append_count(a, 300, 3);
    (void)step(e);
    delta_session_cancel(a);
    (void)step(e);
    CHECK(x.finished && x.reason == DELTA_FINISH_CANCELLED && !delta_session_busy(a));
    size_t n;
    (void)delta_session_tokens(a, &n);
    CHECK_EQ(n, 64);
    CHECK_EQ(delta_session_computed(a), 64);
    delta_stopping st = { .max_tokens = 2 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), DELTA_ESTATE);
    memset(&x, 0, sizeof x);
    append_count(a, 50, 1);
    generate(a, 2);
    run(e, a);
    CHECK_EQ(x.n, 2);
    CHECK_EQ(x.n_prompt, 114);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(bad_logits_end_their_session_alone)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x, y;
    delta_session *a = new_session(e, 100, &x), *b = new_session(e, 100, &y);
    const uint32_t bad = NAN_TOKEN;
    CHECK_EQ(delta_session_append(a, &bad, 1, NULL), 0);
    append_count(b, 10, 3);
    generate(a, 5);
    generate(b, 5);
    run(e, b);
    CHECK(x.finished && x.reason == DELTA_FINISH_ERROR);
    CHECK_EQ(x.error.code, DELTA_EINTERNAL);
    CHECK_EQ(y.n, 5);
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

TEST(a_device_fault_is_the_engines_end)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x;
    delta_session *a = new_session(e, 100, &x);
    const uint32_t bad = FAULT_TOKEN;
    CHECK_EQ(delta_session_append(a, &bad, 1, NULL), 0);
    CHECK_EQ(step(e), DELTA_EDEVICE);
    CHECK_EQ(step(e), DELTA_EDEVICE);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(a_paused_session_gets_no_rows_and_loses_nothing)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x, y;
    delta_session *a = new_session(e, 100, &x), *b = new_session(e, 100, &y);
    append_count(a, 10, 3);
    generate(a, 10);
    append_count(b, 10, 3);
    generate(b, 10);
    (void)step(e);
    delta_session_pause(a, true);
    (void)step(e);
    CHECK_EQ(n_rows_last, 1);
    run(e, b);
    CHECK_EQ(x.n, 1);
    CHECK_EQ(step(e), 0);
    delta_session_pause(a, false);
    run(e, a);
    CHECK_EQ(x.n, 10);
    CHECK(memcmp(x.ids, y.ids, sizeof x.ids) == 0);
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

TEST(calls_in_the_wrong_state_or_out_of_range_are_refused)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x;
    delta_session *a = NULL;
    a = new_session(e, 20, &x);
    CHECK_EQ(delta_session_reserve(a, 0, NULL), DELTA_EINVALID);
    delta_stopping st = { .max_tokens = 100 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), DELTA_ESTATE);
    uint32_t ids[21] = { 0 };
    CHECK_EQ(delta_session_append(a, ids, 4097, NULL), DELTA_ELIMIT);
    ids[3] = VOCAB;
    CHECK_EQ(delta_session_append(a, ids, 10, NULL), DELTA_EINVALID);
    ids[3] = 3;
    CHECK_EQ(delta_session_append(a, ids, 10, NULL), 0);
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    CHECK_EQ(delta_session_append(a, ids, 1, NULL), DELTA_ESTATE);
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), DELTA_ESTATE);
    run(e, a); /* the session's room is its end */
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_EQ(x.n, 10);
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), DELTA_ELIMIT);
    delta_session_free(a);
    a = new_session(e, 20, &x);
    append_count(a, 5, 1);
    generate(a, 5);
    (void)step(e);
    delta_session_free(a); /* while it runs */
    CHECK_EQ(step(e), 0);
    delta_engine_free(e);
}
