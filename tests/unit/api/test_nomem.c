/* Out of memory at every place where the engine asks for some: the error says so, nothing leaks, and
 * what stood before goes on. */
#include "support/tap.h"

#include "support/failing_malloc.h"

#include <dirent.h>
#include <sched.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "cache/store.h"
#include "delta/chat.h"
#include "delta/engine.h"
#include "delta/grammar.h"
#include "delta/openai.h"
#include "delta/output.h"
#include "delta/session.h"
#include "delta/step.h"
#include "delta/tokenizer.h"

static const char model[] = TESTS_DIR "/model/golden/tiny-c";

__attribute__((constructor)) static void more_time(void)
{
    tap_timeout_s = 300; /* under a sanitizer */
}

static int open_tokenizer(delta_error *err)
{
    delta_tokenizer *t = NULL;
    const int r = delta_tokenizer_open(model, &t, err);
    CHECK((r == 0) == (t != NULL));
    delta_tokenizer_free(t);
    return r;
}

TEST(opening_a_tokenizer)
{
    fm_torture("tokenizer", open_tokenizer, 100, 7, false);
    fm_torture("tokenizer, all after", open_tokenizer, 100, 7, true);
}

static int open_engine(delta_error *err)
{
    const delta_engine_options o = {
        .model_dir = model, .threads = 2, .max_sessions = 2, .kv_tokens = 256, .step_tokens = 64
    };
    delta_engine *e = NULL;
    const int r = delta_engine_open(&o, &e, err);
    CHECK((r == 0) == (e != NULL));
    delta_engine_free(e);
    return r;
}

TEST(opening_an_engine)
{
    fm_torture("engine", open_engine, 120, 29, false);
    fm_torture("engine, all after", open_engine, 120, 61, true);
}

static char folder[] = "/tmp/test-nomem-XXXXXX", saved[64];
static uint8_t piece[1 + DE_STORE_READERS][DE_STORE_PIECE];

static int finish_write(de_store *st, uint64_t *ret_id, delta_error *err)
{
    for (;;) {
        const enum de_store_phase phase = de_store_write_phase(st);
        if (phase == DE_STORE_DONE || phase == DE_STORE_FAILED)
            return de_store_write_end(st, ret_id, err);
        if (phase == DE_STORE_YOURS)
            de_store_write_put(st);
        (void)sched_yield();
    }
}

static int finish_read(de_store *st, delta_error *err)
{
    for (;;) {
        const enum de_store_phase phase = de_store_read_phase(st);
        if (phase == DE_STORE_DONE || phase == DE_STORE_FAILED)
            return de_store_read_end(st, err);
        if (phase == DE_STORE_YOURS)
            de_store_read_next(st);
        (void)sched_yield();
    }
}

/* A record written, found and read, one that makes room, a save written, checked and adopted. */
static int through_disk(delta_error *err)
{
    const de_store_options o = {
        folder, 10000, { .slot_bytes = 100, .page_bytes = 64, .page_tokens = 4 }, piece[0], piece[1]
    };
    const de_store_save save = { saved, "text", 4, 1 << 20 };
    uint32_t ids[40], first, tokens;
    uint64_t id = 0, bytes;
    de_store *st = NULL;
    de_store_found f;
    for (uint32_t i = 0; i < 40; i++)
        ids[i] = i;
    int r = de_store_open(&o, &st, &f, err);
    CHECK((r == 0) == (st != NULL));
    for (uint32_t n = 20; r == 0 && n <= 40; n += 10) {
        ids[0]++;
        r = de_store_write_begin(st, 1, ids, n, NULL, &first, &bytes, err);
        if (r == 0)
            r = finish_write(st, &id, err);
    }
    if (r == 0)
        r = de_store_read_begin(st, id, 0, err);
    if (r == 0)
        r = finish_read(st, err);
    if (r == 0)
        r = de_store_write_begin(st, 1, ids, 30, &save, &first, &bytes, err);
    if (r == 0)
        r = finish_write(st, &id, err);
    if (r == 0)
        r = de_store_check(&o.kind, saved, DE_RECORD_ALIGN, &tokens, err);
    if (r == 0)
        r = de_store_adopt(st, saved, DE_RECORD_ALIGN, 2, err);
    if (r == 0)
        CHECK_EQ(de_store_find(st, 2, ids, 40, 40, &id), 30);
    de_store_close(st);
    return r;
}

TEST(the_third_tier)
{
    REQUIRE(mkdtemp(folder) != NULL);
    (void)snprintf(saved, sizeof saved, "%s/x.save", folder);
    fm_torture("third tier", through_disk, 300, 1, false);
    fm_torture("third tier, all after", through_disk, 300, 1, true);
    CHECK_EQ(through_disk(&(delta_error){ 0 }), 0);
    DIR *d = opendir(folder);
    for (struct dirent *x; d && (x = readdir(d));) {
        char path[300];
        (void)snprintf(path, sizeof path, "%s/%s", folder, x->d_name);
        (void)unlink(path);
    }
    if (d)
        (void)closedir(d);
    CHECK_EQ(rmdir(folder), 0);
}

static delta_tokenizer *tok;

static int through_tokens(delta_error *err)
{
    static const char text[] = "<|im_start|>user\ne\xcc\x81 12 abc\n  \xe4\xbd\xa0<|im_end|>";
    uint32_t *ids = NULL;
    size_t n, len;
    char *back = NULL;
    int r = delta_tokenize(tok, text, sizeof text - 1, false, &ids, &n, err);
    if (r == 0)
        r = delta_detokenize(tok, ids, n, false, &back, &len, err);
    free(ids);
    free(back);
    return r;
}

TEST(text_to_tokens_and_back)
{
    delta_error err;
    REQUIRE(delta_tokenizer_open(model, &tok, &err) == 0);
    fm_torture("tokens", through_tokens, 1000, 1, false);
    delta_tokenizer_free(tok);
}

static const char messages[] =
    "[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\",\"content\":[{\"type\":"
    "\"text\",\"text\":\"Weather?\"}]},{\"role\":\"assistant\",\"content\":\"\",\"reasoning_"
    "content\":"
    "\"hm\",\"tool_calls\":[{\"id\":\"1\",\"type\":\"function\",\"function\":{\"name\":\"f\","
    "\"arguments\":{\"a\":[1,true,null],\"b\":\"x\"}}}]},{\"role\":\"tool\",\"content\":\"18C\"}]";
static const char tools[] = "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":"
                            "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"array\"}}}}}]";

static int render(delta_error *err)
{
    delta_openai *o = NULL;
    delta_rendered x = { 0 };
    int r = delta_openai_parse(messages, sizeof messages - 1, tools, sizeof tools - 1, &o, err);
    if (r == 0)
        r = delta_chat_render(delta_openai_chat(o), &x, err);
    delta_rendered_done(&x);
    delta_openai_free(o);
    return r;
}

TEST(a_conversation_to_a_prompt)
{
    fm_torture("prompt", render, 1000, 1, false);
    fm_torture("prompt, all after", render, 1000, 1, true);
}

static int parse_output(delta_error *err)
{
    static const char text[] =
        "Let me think.</think>\n\nSo.\n<tool_call>\n<function=f>\n<parameter=a>"
        "\n[1, {\"b\": 2}]\n</parameter>\n<parameter=c>\nlong text\n</parameter>"
        "\n</function>\n</tool_call>";
    static const char tool[] =
        "{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":"
        "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"array\"}}}}}";
    const delta_str declared = { tool, sizeof tool - 1 };
    const delta_output_options o = { .thinking = true, .tools_json = &declared, .n_tools = 1 };
    const delta_out_event *events;
    size_t n;
    enum delta_out_finish finish;
    delta_output *p = NULL;
    int r = delta_output_new(&o, &p, err);
    for (size_t i = 0; r == 0 && i < sizeof text - 1; i++)
        r = delta_output_push(p, text + i, 1, false, &events, &n, err);
    if (r == 0)
        r = delta_output_finish(p, DELTA_OUT_END_STOP, &events, &n, &finish, err);
    delta_output_free(p);
    return r;
}

TEST(an_answer_to_its_parts)
{
    fm_torture("answer", parse_output, 1000, 1, false);
    fm_torture("answer, all after", parse_output, 1000, 1, true);
}

static delta_grammar_vocab *vocab;

static int compile(delta_error *err)
{
    static const char schema[] =
        "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},"
        "\"b\":{\"enum\":[\"x\",\"y\"]}},\"required\":[\"a\"]}";
    const delta_grammar_spec spec = { .content = DELTA_CONTENT_SCHEMA,
                                      .text = { schema, sizeof schema - 1 } };
    static uint32_t bits[2048 / 32];
    delta_grammar *g = NULL;
    delta_matcher *m = NULL;
    int r = delta_grammar_compile(vocab, &spec, &g, err);
    if (r == 0)
        r = delta_matcher_new(g, &m, err);
    if (r == 0)
        CHECK(delta_matcher_mask(m, bits) != DELTA_MASK_DEAD);
    delta_matcher_free(m);
    delta_grammar_free(g);
    return r;
}

static int open_vocab(delta_error *err)
{
    delta_grammar_vocab *v = NULL;
    const uint32_t end = 2014;
    const int r = delta_grammar_vocab_new(tok, 2048, &end, 1, &v, err);
    delta_grammar_vocab_free(v);
    return r;
}

TEST(a_schema_to_a_mask)
{
    delta_error err;
    const uint32_t end = 2014;
    REQUIRE(delta_tokenizer_open(model, &tok, &err) == 0);
    fm_torture("vocabulary of grammars", open_vocab, 1000, 1, false);
    REQUIRE(delta_grammar_vocab_new(tok, 2048, &end, 1, &vocab, &err) == 0);
    fm_torture("grammar", compile, 400, 3, false);
    fm_torture("grammar, all after", compile, 400, 3, true);
    delta_grammar_vocab_free(vocab);
    delta_tokenizer_free(tok);
}

static delta_engine *engine;
static uint32_t first_ids[4];
static bool have_first;

static int generate(delta_error *err)
{
    static const uint32_t prompt[] = { 5, 6, 7, 8, 9 };
    static const delta_stop_string stop = { "never said", 10 };
    const delta_sampling greedy = {
        .repetition_penalty = 1.5f, .top_p = 1, .logprobs = true, .top_logprobs = 2
    };
    const delta_stopping stopping = { .max_tokens = 4, .strings = &stop, .n_strings = 1 };
    uint32_t ids[4], n_ids = 0;
    delta_session *s = NULL;
    int r = delta_session_new(engine, 0, NULL, &s, err);
    if (r == 0)
        r = delta_session_append(s, prompt, 5, err);
    if (r == 0)
        r = delta_session_reserve(s, 100, err);
    if (r == 0)
        r = delta_session_generate(s, &greedy, &stopping, err);
    while (r == 0 && delta_session_busy(s)) {
        const delta_event *v;
        size_t n;
        r = delta_step(engine, &v, &n, err);
        for (size_t i = 0; r == 0 && i < n; i++) {
            if (v[i].kind == DELTA_EVENT_TOKEN && n_ids < 4)
                ids[n_ids++] = v[i].token.id;
            if (v[i].kind == DELTA_EVENT_FINISHED && v[i].finished.reason == DELTA_FINISH_ERROR) {
                *err = v[i].finished.error;
                r = err->code;
            }
        }
    }
    if (r == 0) {
        CHECK_EQ(n_ids, 4);
        if (!have_first)
            memcpy(first_ids, ids, sizeof ids);
        CHECK(memcmp(first_ids, ids, sizeof ids) == 0);
        have_first = true;
    }
    delta_session_free(s);
    delta_engine_stats st;
    delta_engine_stats_get(engine, &st);
    CHECK_EQ(st.pages_used, 0);
    CHECK_EQ(st.sessions_used, 0);
    return r;
}

TEST(a_session_that_fails_leaves_the_engine_as_it_was)
{
    const delta_engine_options o = {
        .model_dir = model, .threads = 2, .max_sessions = 2, .kv_tokens = 256, .step_tokens = 64
    };
    delta_error err = { 0 };
    REQUIRE(delta_engine_open(&o, &engine, &err) == 0);
    fm_torture("session", generate, 1000, 1, false);
    fm_torture("session, all after", generate, 1000, 1, true);
    CHECK_EQ(generate(&err), 0);
    delta_engine_free(engine);
}
