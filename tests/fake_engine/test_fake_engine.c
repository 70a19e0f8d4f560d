/* The fake engine does what its script says, and keeps the contract of step.h while doing so. */
#include "support/tap.h"

#include "delta/delta.h"

static void script(const char *json)
{
    static char path[64];
    (void)snprintf(path, sizeof path, "/tmp/delta-fake-%ld.json", (long)getpid());
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(json, f) >= 0);
    if (f)
        (void)fclose(f);
    CHECK_EQ(setenv("DELTA_FAKE", path, 1), 0);
}

static delta_engine *open_engine(void)
{
    const delta_engine_options o = { .model_dir = DEMO_MODEL_DIR, .max_sessions = 4 };
    delta_engine *e = NULL;
    delta_error err = { 0 };
    if (delta_engine_open(&o, &e, &err) < 0)
        TAP_FAIL("%s", err.text);
    (void)remove(getenv("DELTA_FAKE"));
    return e;
}

typedef struct result {
    char text[1000];
    size_t len;
    uint32_t n, total;
    bool finished;
    enum delta_finish reason;
} result;

static int run(delta_engine *e, delta_session *s, result *x)
{
    memset(x, 0, sizeof *x);
    while (delta_session_busy(s)) {
        const delta_event *v;
        size_t n;
        int r = delta_step(e, &v, &n, NULL);
        if (r < 0)
            return r;
        for (size_t i = 0; i < n; i++) {
            CHECK(!x->finished);
            if (v[i].kind == DELTA_EVENT_TEXT) {
                memcpy(x->text + x->len, v[i].text.bytes, v[i].text.len);
                x->len += v[i].text.len;
            } else if (v[i].kind == DELTA_EVENT_PREFILL) {
                x->total = v[i].prefill.total;
                CHECK(v[i].prefill.done <= x->total);
            } else if (v[i].kind == DELTA_EVENT_FINISHED) {
                x->finished = true;
                x->reason = v[i].finished.reason;
            } else {
                x->n++;
            }
        }
    }
    return 0;
}

static delta_session *ask(delta_engine *e, const char *text, uint32_t max)
{
    delta_session *s = NULL;
    uint32_t *ids = NULL;
    size_t n = 0;
    const delta_sampling p = delta_sampling_default(false);
    CHECK_EQ(delta_session_new(e, 0, NULL, &s, NULL), 0);
    CHECK_EQ(delta_tokenize(delta_engine_tokenizer(e), text, strlen(text), false, &ids, &n, NULL),
             0);
    CHECK_EQ(delta_session_append(s, ids, n, NULL), 0);
    CHECK_EQ(delta_session_reserve(s, 500, NULL), 0);
    CHECK_EQ(delta_session_generate(s, &p, &(delta_stopping){ .max_tokens = max }, NULL), 0);
    free(ids);
    return s;
}

TEST(fake_engine_says_the_reply_of_the_prompt)
{
    static result x;
    script("{\"replies\":[{\"prompt\":\"weather\",\"text\":\"Rain.\"}],\"reply\":\"What?\"}");
    delta_engine *e = open_engine();
    delta_session *s = ask(e, "How is the weather?", 100);
    CHECK_EQ(run(e, s, &x), 0);
    CHECK_MEM(x.text, x.len, "Rain.", 5);
    CHECK_EQ(x.reason, DELTA_FINISH_STOP_ID);
    CHECK(x.total > 0);
    delta_session_free(s);
    s = ask(e, "Hm", 1);
    CHECK_EQ(run(e, s, &x), 0);
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_EQ(x.n, 1);
    delta_session_free(s);
    delta_engine_free(e);
}

TEST(fake_engine_fails_where_it_is_told_to)
{
    static result x;
    script("{\"error_token\":2}");
    delta_engine *e = open_engine();
    delta_session *s = ask(e, "Hm", 9);
    CHECK_EQ(run(e, s, &x), 0);
    CHECK(x.finished && x.reason == DELTA_FINISH_ERROR && x.n == 1);
    delta_session_free(s);
    delta_engine_free(e);
    script("{\"fault_step\":3,\"busy_sessions\":2}");
    e = open_engine();
    s = ask(e, "Hm", 9);
    delta_session *t = NULL;
    CHECK_EQ(delta_session_new(e, 0, NULL, &t, NULL), 0);
    CHECK_EQ(delta_session_reserve(t, 10, NULL), DELTA_EBUSY);
    delta_session_free(t);
    CHECK_EQ(run(e, s, &x), DELTA_EDEVICE);
    delta_session_free(s);
    delta_engine_free(e);
}

TEST(fake_engine_cancels)
{
    static result x;
    script("{\"tokens_per_second\":5}");
    delta_engine *e = open_engine();
    delta_session *s = ask(e, "Hm", 9);
    delta_session_cancel(s);
    CHECK_EQ(run(e, s, &x), 0);
    CHECK(x.finished && x.reason == DELTA_FINISH_CANCELLED && x.n == 0);
    delta_session_free(s);
    delta_engine_free(e);
}
