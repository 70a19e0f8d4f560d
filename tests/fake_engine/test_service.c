/* test_service.c -- the service in this process, over the fake engine, with a scripted transport. */
#include <time.h>
#include <uv.h>

#include "base/clock.h"
#include "daemon/codec_std.h"
#include "daemon/config.h"
#include "daemon/engine_thread.h"
#include "daemon/service.h"
#include "daemon/wire.h"
#include "deltad/v1/inference.pb-c.h"
#include "deltad/v1/model.pb-c.h"
#include "deltad/v1/session.pb-c.h"
#include "support/tap.h"

typedef struct call {
    dd_rpc rpc; /* first */
    struct {
        uint8_t *p;
        size_t len;
    } sent[4096];
    size_t n_sent, n_acked;
    bool holds, is_finished;
    dd_status st;
} call;

static uv_loop_t loop;
static dd_config config;
static dd_service *service;
static bool is_ready, is_fatal, is_drained;

static void on_load(void *arg, const char *phase, double progress)
{
    (void)arg, (void)phase, (void)progress;
}
static void on_ready(void *arg)
{
    (void)arg;
    is_ready = true;
}
static void on_fatal(void *arg, const char *why)
{
    (void)arg, (void)why;
    is_fatal = true;
}
static void on_drained(void *arg)
{
    (void)arg;
    is_drained = true;
}

static void vt_send(dd_rpc *r, uint8_t *msg, size_t len)
{
    call *c = (call *)r;
    if (c->is_finished || c->n_sent != c->n_acked || c->n_sent == 4096)
        abort(); /* one outstanding, none after the end */
    c->sent[c->n_sent].p = msg;
    c->sent[c->n_sent++].len = len;
}

static void vt_finish(dd_rpc *r, const dd_status *st)
{
    call *c = (call *)r;
    if (c->is_finished)
        abort();
    c->is_finished = true;
    c->st = *st;
}
static const dd_rpc_vtable vtable = { vt_send, vt_finish };

static call *calls[256];
static size_t n_calls;

static void turn(void)
{
    (void)uv_run(&loop, UV_RUN_NOWAIT);
    for (size_t i = 0; i < n_calls; i++) {
        call *c = calls[i];
        if (!c->holds && !c->is_finished && c->n_acked < c->n_sent) {
            c->n_acked = c->n_sent;
            dd_service_sent(service, &c->rpc);
        }
    }
    (void)nanosleep(&(struct timespec){ .tv_nsec = 200000 }, NULL);
}
#define UNTIL(cond)                                                                                \
    do {                                                                                           \
        uint64_t until_ = de_now_ns() + 10000000000u;                                              \
        while (!(cond) && de_now_ns() < until_)                                                    \
            turn();                                                                                \
        CHECK(cond);                                                                               \
    } while (0)

static void up(const char *script)
{
    static char path[] = "/tmp/fake-XXXXXX";
    delta_error err;
    if (script) {
        int fd = mkstemp(path);
        if (fd < 0 || write(fd, script, strlen(script)) < 0)
            abort();
        (void)close(fd);
        (void)setenv("DELTA_FAKE", path, 1);
    }
    (void)uv_loop_init(&loop);
    dd_config_defaults(&config);
    free(config.model.path);
    config.model.path = strdup(DEMO_MODEL_DIR);
    const dd_service_options o = { .loop = &loop,
                                   .config = &config,
                                   .on_load = on_load,
                                   .on_ready = on_ready,
                                   .on_fatal = on_fatal };
    if (dd_service_new(&o, &service, &err) < 0)
        abort();
    UNTIL(is_ready || is_fatal);
    if (script)
        (void)unlink(path);
}

static void down(void)
{
    for (size_t i = 0; i < n_calls; i++)
        calls[i]->holds = false;
    dd_service_drain(service, on_drained, NULL);
    dd_service_abort_all(service);
    dd_service_abort_all(service);
    UNTIL(is_drained);
    dd_service_free(service);
    (void)uv_run(&loop, UV_RUN_DEFAULT);
    CHECK_EQ(uv_loop_close(&loop), 0);
    for (size_t i = 0; i < n_calls; i++) {
        for (size_t k = 0; k < calls[i]->n_sent; k++)
            free(calls[i]->sent[k].p);
        free(calls[i]);
    }
    n_calls = 0;
    dd_config_done(&config);
}

/* From TCP on the number of a connection of TCP; from TCP + 100 on of another address. */
enum { TCP = 100000, ADMIN = 900 };
static dd_peer peer_of(uint32_t uid)
{
    if (uid < TCP)
        return (dd_peer){ .is_unix = true, .uid = uid, .gid = uid, .in_admin_group = uid == ADMIN };
    return (dd_peer){ .connection = uid,
                      .uid = UINT32_MAX,
                      .gid = UINT32_MAX,
                      .address = { [15] = uid < TCP + 100 ? 1 : 2 } };
}

static call *begin(const char *path, uint32_t uid, uint64_t deadline_ns, const ProtobufCMessage *m)
{
    uint8_t *buffer = malloc(protobuf_c_message_get_packed_size(m) + 1);
    call *c = calloc(1, sizeof *c);
    if (n_calls == sizeof calls / sizeof calls[0])
        abort();
    calls[n_calls++] = c;
    c->rpc = (dd_rpc){ .vt = &vtable,
                       .method = dd_service_method_find(path, strlen(path)),
                       .peer = peer_of(uid),
                       .arrived_ns = de_now_ns(),
                       .deadline_ns = deadline_ns };
    size_t len = protobuf_c_message_pack(m, buffer);
    dd_service_start(service, &c->rpc);
    dd_service_message(service, &c->rpc, buffer, len);
    free(buffer);
    return c;
}

static Deltad__V1__Part part;
static Deltad__V1__Message message;
static Deltad__V1__Message *messages[1] = { &message };
static Deltad__V1__Part *parts[1] = { &part };
static Deltad__V1__Reasoning reasoning;
static Deltad__V1__Scheduling scheduling;
static Deltad__V1__Stopping stopping;

static Deltad__V1__ChatRequest chat_of(const char *text)
{
    Deltad__V1__ChatRequest q = DELTAD__V1__CHAT_REQUEST__INIT;
    part = (Deltad__V1__Part)DELTAD__V1__PART__INIT;
    part.part_case = DELTAD__V1__PART__PART_TEXT;
    part.text = (char *)text;
    message = (Deltad__V1__Message)DELTAD__V1__MESSAGE__INIT;
    message.role = DELTAD__V1__ROLE__ROLE_USER;
    message.parts = parts;
    message.n_parts = 1;
    reasoning = (Deltad__V1__Reasoning)DELTAD__V1__REASONING__INIT;
    scheduling = (Deltad__V1__Scheduling)DELTAD__V1__SCHEDULING__INIT;
    stopping = (Deltad__V1__Stopping)DELTAD__V1__STOPPING__INIT;
    q.messages = messages;
    q.n_messages = text ? 1 : 0;
    return q;
}
#define CHAT "/deltad.v1.InferenceService/Chat"
#define SESSION_PATH(x) "/deltad.v1.SessionService/" x

static Deltad__V1__ChatEvent *event(call *c, size_t i)
{
    return deltad__v1__chat_event__unpack(NULL, c->sent[i].len, c->sent[i].p);
}
static void release(Deltad__V1__ChatEvent *e)
{
    deltad__v1__chat_event__free_unpacked(e, NULL);
}
static uint32_t prompt_tokens(call *c)
{
    Deltad__V1__ChatEvent *e = event(c, 0);
    uint32_t n = e->accepted->prompt_tokens;
    release(e);
    return n;
}
static int reason(call *c)
{
    Deltad__V1__ChatEvent *e = c->n_sent ? event(c, c->n_sent - 1) : NULL;
    int r = e && e->event_case == DELTAD__V1__CHAT_EVENT__EVENT_FINISHED ? (int)e->finished->reason
                                                                         : -1;
    if (e)
        release(e);
    return r;
}

/* The id of a new session; static. */
static const char *new_session_of(uint32_t uid, bool with_message, bool has_idle, uint64_t idle_ns,
                                  call **ret_c)
{
    static char id[64];
    Deltad__V1__CreateSessionRequest q = DELTAD__V1__CREATE_SESSION_REQUEST__INIT;
    Deltad__V1__ChatRequest c = chat_of("Remember this.");
    q.messages = c.messages;
    q.n_messages = with_message;
    if (has_idle) {
        q.idle_timeout_opt_case =
            DELTAD__V1__CREATE_SESSION_REQUEST__IDLE_TIMEOUT_OPT_IDLE_TIMEOUT_NS;
        q.idle_timeout_ns = idle_ns;
    }
    call *x = begin(SESSION_PATH("CreateSession"), uid, 0, &q.base);
    uint64_t until = de_now_ns() + 10000000000u;
    while (!x->is_finished && de_now_ns() < until)
        turn();
    if (ret_c)
        *ret_c = x;
    id[0] = '\0';
    if (x->n_sent) {
        Deltad__V1__CreateSessionResponse *r =
            deltad__v1__create_session_response__unpack(NULL, x->sent[0].len, x->sent[0].p);
        (void)snprintf(id, sizeof id, "%s", r->session->id);
        deltad__v1__create_session_response__free_unpacked(r, NULL);
    }
    return id;
}
static const char *new_session(bool with_message, bool has_idle, uint64_t idle_ns, call **ret_c)
{
    return new_session_of(1000, with_message, has_idle, idle_ns, ret_c);
}
static int get_code(const char *id, uint32_t uid)
{
    Deltad__V1__GetSessionRequest q = DELTAD__V1__GET_SESSION_REQUEST__INIT;
    q.session_id = (char *)id;
    return (int)begin(SESSION_PATH("GetSession"), uid, 0, &q.base)->st.code;
}

static unsigned n_busy(void)
{
    Deltad__V1__GetStatsRequest q = DELTAD__V1__GET_STATS_REQUEST__INIT;
    call *c = begin("/deltad.v1.ModelService/GetStats", 1000, 0, &q.base);
    Deltad__V1__GetStatsResponse *r =
        deltad__v1__get_stats_response__unpack(NULL, c->sent[0].len, c->sent[0].p);
    unsigned n = r->requests_running + r->requests_queued;
    deltad__v1__get_stats_response__free_unpacked(r, NULL);
    free(c->sent[0].p);
    free(c);
    n_calls--;
    return n;
}

TEST(chat_tells_accepted_first_then_text_then_finished_with_rising_numbers)
{
    up("{\"reply\": \"I think.</think>\\n\\nHello you there.\"}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    call *c = begin(CHAT, 1000, 0, &q.base);
    UNTIL(c->is_finished);
    CHECK_EQ(c->st.code, DD_OK);
    REQUIRE(c->n_sent >= 4);
    char text[256] = "", thought[256] = "";
    for (size_t i = 0; i < c->n_sent; i++) {
        Deltad__V1__ChatEvent *e = event(c, i);
        CHECK_EQ(e->seq, i + 1);
        CHECK((i == 0) == (e->event_case == DELTAD__V1__CHAT_EVENT__EVENT_ACCEPTED));
        CHECK((i == c->n_sent - 1) == (e->event_case == DELTAD__V1__CHAT_EVENT__EVENT_FINISHED));
        if (e->event_case == DELTAD__V1__CHAT_EVENT__EVENT_TEXT)
            (void)strcat(text, e->text->text);
        if (e->event_case == DELTAD__V1__CHAT_EVENT__EVENT_REASONING)
            (void)strcat(thought, e->reasoning->text);
        release(e);
    }
    CHECK_STR(text, "Hello you there.");
    CHECK_STR(thought, "I think.");
    CHECK_EQ(reason(c), 1);
    down();
}

TEST(session_that_is_closed_at_once_is_answered_first)
{
    up(NULL);
    call *c;
    (void)new_session(true, true, 1, &c);
    CHECK(c->is_finished);
    CHECK_EQ(c->st.code, DD_OK);
    down();
}

TEST(session_with_the_longest_idle_timeout_stays)
{
    up(NULL);
    const char *id = new_session(false, true, UINT64_MAX, NULL);
    for (int i = 0; i < 20; i++)
        turn();
    CHECK_EQ(get_code(id, 1000), DD_OK);
    CHECK_EQ(get_code(id, 1001), DD_NOT_FOUND);
    down();
}

TEST(longest_wall_time_does_not_end_a_request)
{
    up("{\"tokens_per_second\": 200, \"reply\": \"x</think>\\n\\none two three four five six\"}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    scheduling.max_wall_time_opt_case = DELTAD__V1__SCHEDULING__MAX_WALL_TIME_OPT_MAX_WALL_TIME_NS;
    scheduling.max_wall_time_ns = UINT64_MAX;
    q.scheduling = &scheduling;
    call *c = begin(CHAT, 1000, 0, &q.base);
    UNTIL(c->is_finished);
    CHECK_EQ(reason(c), 1);
    down();
}

TEST(longest_queue_time_does_not_end_a_request)
{
    up("{\"tokens_per_second\": 200, \"reply\": \"x</think>\\n\\none two three four five six\"}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    scheduling.max_queue_opt_case = DELTAD__V1__SCHEDULING__MAX_QUEUE_OPT_MAX_QUEUE_NS;
    scheduling.max_queue_ns = UINT64_MAX;
    q.scheduling = &scheduling;
    call *c = begin(CHAT, 1000, 0, &q.base);
    UNTIL(c->is_finished);
    CHECK_EQ(c->st.code, DD_OK);
    down();
}

static void on_prepare(uv_prepare_t *p)
{
    uint64_t *until = p->data;
    while (*until && de_now_ns() < *until)
        (void)nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    *until = 0;
}

/* The loop was busy while the deadline passed and the answer came: both are found in one turn. */
TEST(deadline_that_passes_with_the_last_event_of_a_session_ends_the_call_once)
{
    uint64_t until = 0;
    uv_prepare_t p;
    up("{\"reply\": \"x</think>\\n\\ndone\"}");
    char id[64];
    (void)snprintf(id, sizeof id, "%s", new_session(false, false, 0, NULL));
    (void)uv_prepare_init(&loop, &p);
    p.data = &until;
    (void)uv_prepare_start(&p, on_prepare);
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    q.session_id = id;
    uint64_t deadline = de_now_ns() + 50000000;
    call *c = begin(CHAT, 1000, deadline, &q.base);
    until = deadline + 20000000;
    UNTIL(c->is_finished);
    (void)uv_prepare_stop(&p);
    uv_close((uv_handle_t *)&p, NULL);
    (void)uv_run(&loop, UV_RUN_NOWAIT);
    CHECK_EQ(get_code(id, 1000), DD_OK);
    down();
}

TEST(session_goes_on_with_what_is_new_and_without_new_messages)
{
    up("{\"reply\": \"x</think>\\n\\nyes.\"}");
    char id[64];
    (void)snprintf(id, sizeof id, "%s", new_session(true, false, 0, NULL));
    Deltad__V1__ChatRequest q = chat_of(NULL);
    q.session_id = id;
    call *a = begin(CHAT, 1000, 0, &q.base);
    UNTIL(a->is_finished);
    CHECK_EQ(a->st.code, DD_OK);
    q = chat_of("And now?");
    q.session_id = id;
    call *b = begin(CHAT, 1000, 0, &q.base);
    UNTIL(b->is_finished);
    CHECK_EQ(b->st.code, DD_OK);
    CHECK(prompt_tokens(b) > prompt_tokens(a));
    down();
}

TEST(session_asked_to_forget_reasoning_computes_a_prompt_without_it)
{
    up("{\"reply\": \"one two three four five six seven eight nine ten eleven twelve thirteen "
       "fourteen fifteen sixteen</think>\\n\\nyes.\"}");
    uint32_t n[2];
    for (int keep = 0; keep < 2; keep++) {
        char id[64];
        (void)snprintf(id, sizeof id, "%s", new_session(false, false, 0, NULL));
        Deltad__V1__ChatRequest q = chat_of("First?");
        q.session_id = id;
        call *a = begin(CHAT, 1000, 0, &q.base);
        UNTIL(a->is_finished);
        q = chat_of("Second?");
        q.session_id = id;
        reasoning.preserve_opt_case = DELTAD__V1__REASONING__PRESERVE_OPT_PRESERVE;
        reasoning.preserve = keep;
        q.reasoning = &reasoning;
        call *b = begin(CHAT, 1000, 0, &q.base);
        UNTIL(b->is_finished);
        CHECK_EQ(b->st.code, DD_OK);
        n[keep] = prompt_tokens(b);
    }
    printf("# prompt: %u tokens without earlier reasoning, %u with\n", n[0], n[1]);
    CHECK(n[0] + 10 < n[1]);
    down();
}

/* The transcript's texts end at a NUL where they are unpacked, so none may be in it. */
TEST(session_whose_answer_has_a_nul_is_computed_again_as_it_was)
{
    up("{\"busy_sessions\": 2, \"replies\": [{\"prompt\": \"First\", \"text\": "
       "\"before\\u0000after the nul there is "
       "more\"}], "
       "\"reply\": \"yes.\"}");
    uint32_t n[2];
    for (int again = 0; again < 2; again++) {
        char id[64];
        (void)snprintf(id, sizeof id, "%s", new_session(false, false, 0, NULL));
        Deltad__V1__ChatRequest q = chat_of("First?");
        q.session_id = id;
        reasoning.mode = DELTAD__V1__REASONING__MODE__MODE_OFF;
        q.reasoning = &reasoning;
        call *a = begin(CHAT, 1000, 0, &q.base);
        UNTIL(a->is_finished);
        CHECK_EQ(a->st.code, DD_OK);
        Deltad__V1__GetSessionRequest g = DELTAD__V1__GET_SESSION_REQUEST__INIT;
        g.session_id = id;
        g.with_messages = true;
        call *got = begin(SESSION_PATH("GetSession"), 1000, 0, &g.base);
        CHECK(memmem(got->sent[0].p, got->sent[0].len,
                     "before\xef\xbf\xbd"
                     "after the nul",
                     22));
        if (again) { /* another one takes its place at the engine */
            q = chat_of("Third?");
            call *other = begin(CHAT, 1000, 0, &q.base);
            UNTIL(other->is_finished);
            CHECK_EQ(other->st.code, DD_OK);
        }
        q = chat_of("Second?");
        q.session_id = id;
        reasoning.mode = DELTAD__V1__REASONING__MODE__MODE_OFF;
        q.reasoning = &reasoning;
        call *b = begin(CHAT, 1000, 0, &q.base);
        UNTIL(b->is_finished);
        CHECK_EQ(b->st.code, DD_OK);
        n[again] = prompt_tokens(b);
        Deltad__V1__CloseSessionRequest x = DELTAD__V1__CLOSE_SESSION_REQUEST__INIT;
        x.session_id = id;
        CHECK_EQ(begin(SESSION_PATH("CloseSession"), 1000, 0, &x.base)->st.code, DD_OK);
    }
    CHECK_EQ(n[0], n[1]);
    down();
}

TEST(slow_reader_gets_everything_and_holds_nobody_up)
{
    static char script[300000], *p = script;
    p += sprintf(p, "{\"replies\": [{\"prompt\": \"LONG\", \"text\": \"x</think>\\n\\n");
    for (int i = 0; i < 20000; i++)
        p += sprintf(p, "word%d ", i % 10);
    (void)sprintf(p, "\"}], \"reply\": \"x</think>\\n\\nshort\"}");
    up(script);
    Deltad__V1__ChatRequest q = chat_of("LONG");
    Deltad__V1__Include include[] = { DELTAD__V1__INCLUDE__INCLUDE_TOKENS };
    stopping.max_tokens_opt_case = DELTAD__V1__STOPPING__MAX_TOKENS_OPT_MAX_TOKENS;
    stopping.max_tokens = 2000;
    q.stopping = &stopping;
    q.include = include;
    q.n_include = 1;
    call *slow = begin(CHAT, 1000, 0, &q.base);
    slow->holds = true;
    for (int i = 0; i < 500; i++)
        turn();
    CHECK_EQ(slow->n_sent, 1);
    q = chat_of("short?");
    call *fast = begin(CHAT, 1000, 0, &q.base);
    UNTIL(fast->is_finished);
    CHECK_EQ(fast->st.code, DD_OK);
    slow->holds = false;
    UNTIL(slow->is_finished);
    CHECK_EQ(reason(slow), 3);
    unsigned tokens = 0;
    for (size_t i = 0; i < slow->n_sent; i++) {
        Deltad__V1__ChatEvent *e = event(slow, i);
        CHECK_EQ(e->seq, i + 1);
        tokens += e->event_case == DELTAD__V1__CHAT_EVENT__EVENT_TOKENS;
        release(e);
    }
    CHECK_EQ(tokens, 2000);
    down();
}

/* It looked a thousand times a second whether the reader had taken something. */
TEST(engine_thread_sleeps_while_the_readers_of_all_that_run_are_slow)
{
    up("{\"reply\": \"x</think>\\n\\none two three four five six seven eight nine ten\"}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    Deltad__V1__Include include[] = { DELTAD__V1__INCLUDE__INCLUDE_TOKENS };
    stopping.max_tokens_opt_case = DELTAD__V1__STOPPING__MAX_TOKENS_OPT_MAX_TOKENS;
    stopping.max_tokens = 2000;
    stopping.ignore_eos = true;
    q.stopping = &stopping;
    q.include = include;
    q.n_include = 1;
    call *c = begin(CHAT, 1000, 0, &q.base);
    c->holds = true;
    for (int i = 0; i < 500; i++)
        turn();
    uint64_t before = dd_service_heartbeat(service);
    for (uint64_t until = de_now_ns() + 400000000; de_now_ns() < until;)
        turn();
    uint64_t beats = dd_service_heartbeat(service) - before;
    printf("# %u turns of the engine thread in 400 ms\n", (unsigned)beats);
    CHECK(beats <= 2);
    c->holds = false;
    UNTIL(c->is_finished);
    CHECK_EQ(reason(c), 3);
    q = chat_of("Hi.");
    call *d = begin(CHAT, 1000, 0, &q.base); /* awake again */
    UNTIL(d->is_finished);
    CHECK_EQ(d->st.code, DD_OK);
    /* One that is cancelled while it is paused ends, too. */
    stopping.max_tokens_opt_case = DELTAD__V1__STOPPING__MAX_TOKENS_OPT_MAX_TOKENS;
    stopping.max_tokens = 2000;
    stopping.ignore_eos = true;
    q.stopping = &stopping;
    q.include = include;
    q.n_include = 1;
    c = begin(CHAT, 1000, 0, &q.base);
    c->holds = true;
    for (int i = 0; i < 500; i++)
        turn();
    dd_service_closed(service, &c->rpc);
    UNTIL(n_busy() == 0);
    down();
}

TEST(cancel_is_for_the_same_user_and_ends_the_stream_in_order)
{
    up("{\"tokens_per_second\": 100, \"reply\": \"one two three four five six seven eight nine ten "
       "one two three four five six seven eight nine ten one two three four five six seven\"}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    q.request_id = (char *)"mine";
    call *c = begin(CHAT, 1000, 0, &q.base);
    UNTIL(c->n_sent > 2);
    Deltad__V1__CancelRequest x = DELTAD__V1__CANCEL_REQUEST__INIT;
    x.request_id = (char *)"mine";
    CHECK_EQ(begin("/deltad.v1.InferenceService/Cancel", 1001, 0, &x.base)->st.code, DD_NOT_FOUND);
    CHECK(!c->is_finished);
    CHECK_EQ(begin("/deltad.v1.InferenceService/Cancel", 1000, 0, &x.base)->st.code, DD_OK);
    UNTIL(c->is_finished);
    CHECK_EQ(c->st.code, DD_OK);
    CHECK_EQ(reason(c), 5);
    down();
}

TEST(request_that_waits_is_told_its_place_once_however_often_it_is_tried)
{
    up("{\"busy_sessions\": 2, \"tokens_per_second\": 1}");
    Deltad__V1__Include include[] = { DELTAD__V1__INCLUDE__INCLUDE_QUEUED };
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    call *a = begin(CHAT, 1000, 0, &q.base);
    UNTIL(a->n_sent);
    q = chat_of("Hi.");
    q.include = include;
    q.n_include = 1;
    call *b = begin(CHAT, 1000, 0, &q.base);
    UNTIL(b->n_sent >= 2);
    for (int i = 0; i < 30; i++) { /* others come, and go before their turn */
        q = chat_of("Hi.");
        call *c = begin(CHAT, 1001, 0, &q.base);
        for (int k = 0; k < 5; k++)
            turn();
        dd_service_closed(service, &c->rpc);
        CHECK(c->is_finished);
        for (int k = 0; k < 5; k++)
            turn();
    }
    CHECK(!b->is_finished);
    CHECK_EQ(b->n_sent, 2);
    down();
}

/* The usage was lost with an error after the first event. */
TEST(error_in_the_middle_tells_the_usage_first)
{
    up("{\"error_token\": 6, \"reply\": \"x</think>\\n\\none two three four five six\"}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    call *c = begin(CHAT, 1000, 0, &q.base);
    UNTIL(c->is_finished);
    CHECK_EQ(c->st.code, DD_INTERNAL);
    CHECK_EQ(reason(c), 6);
    REQUIRE(c->n_sent >= 2);
    Deltad__V1__ChatEvent *e = event(c, c->n_sent - 1);
    CHECK_EQ(e->seq, c->n_sent);
    CHECK_EQ(e->finished->usage->completion_tokens, 5);
    CHECK_EQ(e->finished->usage->prompt_tokens, prompt_tokens(c));
    release(e);
    down();
}

TEST(stream_that_a_drain_cuts_tells_the_usage_first)
{
    up("{\"tokens_per_second\": 100, \"reply\": \"one two three four five six seven eight nine ten "
       "one two three four five six seven eight nine ten one two three four five six seven\"}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    call *a = begin(CHAT, 1000, 0, &q.base), *slow = begin(CHAT, 1000, 0, &q.base);
    UNTIL(a->n_sent > 3 && slow->n_sent > 3);
    slow->holds = true;
    UNTIL(slow->n_sent > slow->n_acked);
    dd_service_drain(service, on_drained, NULL);
    dd_service_abort_all(service);
    UNTIL(a->is_finished);
    CHECK_STR(a->st.reason, "DRAINING");
    CHECK_EQ(reason(a), 6);
    for (int i = 0; i < 50; i++)
        turn();
    CHECK(!slow->is_finished);
    dd_service_abort_all(service); /* what is left has had its time */
    CHECK(slow->is_finished);
    CHECK_STR(slow->st.reason, "DRAINING");
    down();
}

TEST(request_that_waits_too_long_says_so_after_its_last_event)
{
    up("{\"busy_sessions\": 2, \"tokens_per_second\": 1}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    call *a = begin(CHAT, 1000, 0, &q.base);
    UNTIL(a->n_sent);
    q = chat_of("Hi.");
    scheduling.max_queue_opt_case = DELTAD__V1__SCHEDULING__MAX_QUEUE_OPT_MAX_QUEUE_NS;
    scheduling.max_queue_ns = 20000000;
    q.scheduling = &scheduling;
    call *b = begin(CHAT, 1000, 0, &q.base);
    UNTIL(b->is_finished);
    CHECK_STR(b->st.reason, "QUEUE_TIME");
    CHECK_EQ(reason(b), 6);
    down();
}

TEST(device_fault_ends_every_stream_and_is_told)
{
    up("{\"fault_step\": 5}");
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    call *a = begin(CHAT, 1000, 0, &q.base), *b = begin(CHAT, 1001, 0, &q.base);
    UNTIL(a->is_finished && b->is_finished && is_fatal);
    CHECK_EQ(a->st.code, DD_UNAVAILABLE);
    CHECK_EQ(b->st.code, DD_UNAVAILABLE);
    CHECK_STR(a->st.reason, "DEVICE_FAULT");
    CHECK_EQ(reason(a), 6);
    CHECK_EQ(reason(b), 6);
    down();
}

TEST(client_that_is_gone_leaves_the_session_usable)
{
    up("{\"tokens_per_second\": 100, \"reply\": \"one two three four five six seven eight nine ten "
       "one two three four five six seven eight nine ten one two three four five six seven\"}");
    char id[64];
    (void)snprintf(id, sizeof id, "%s", new_session(false, false, 0, NULL));
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    q.session_id = id;
    call *a = begin(CHAT, 1000, 0, &q.base);
    UNTIL(a->n_sent > 2);
    q = chat_of("Again.");
    q.session_id = id;
    call *busy = begin(CHAT, 1000, 0, &q.base);
    CHECK_EQ(busy->st.code, DD_ABORTED);
    dd_service_closed(service, &a->rpc);
    CHECK(a->is_finished);
    for (int i = 0; i < 100; i++)
        turn();
    call *b = begin(CHAT, 1000, 0, &q.base);
    UNTIL(b->is_finished);
    CHECK_EQ(b->st.code, DD_OK);
    down();
}

/* Long enough for a worker, and for it to be in the middle of when the test goes on. */
static const char *long_text(size_t len)
{
    enum { MOST = 1 << 22 };
    static const char words[] = "The quick brown fox jumps over 12345 lazy dogs; and so on.\n";
    static char text[MOST + 1];
    for (size_t i = 0; !text[0] || (i && i < MOST); i++)
        text[i] = words[i % (sizeof words - 1)];
    return text + MOST - len;
}
#define TOKENIZE "/deltad.v1.InferenceService/Tokenize"
static Deltad__V1__TokenizeRequest tokenize_of(const char *text)
{
    Deltad__V1__TokenizeRequest q = DELTAD__V1__TOKENIZE_REQUEST__INIT;
    q.text = (char *)text;
    return q;
}
TEST(long_prompt_is_prepared_beside_the_loop_and_answered_as_a_short_one)
{
    up("{\"reply\": \"x</think>\\n\\nyes.\"}");
    Deltad__V1__ChatRequest q = chat_of(long_text(60000));
    call *c = begin(CHAT, 1000, 0, &q.base);
    CHECK_EQ(c->n_sent, 0);
    Deltad__V1__TokenizeRequest x = tokenize_of("short");
    CHECK(begin(TOKENIZE, 1000, 0, &x.base)->is_finished);
    UNTIL(c->is_finished);
    CHECK_EQ(c->st.code, DD_OK);
    CHECK(prompt_tokens(c) > 10000);
    CHECK_EQ(reason(c), 1);
    down();
}

TEST(client_that_is_gone_while_its_prompt_is_prepared_leaves_nothing)
{
    up(NULL);
    char id[64];
    (void)snprintf(id, sizeof id, "%s", new_session(false, false, 0, NULL));
    call *gone[24];
    for (size_t i = 0; i < 24; i++) { /* more than there are workers: some have not begun */
        Deltad__V1__ChatRequest q = chat_of(long_text(300000));
        Deltad__V1__TokenizeRequest x = tokenize_of(long_text(300000));
        q.session_id = i == 7 ? id : (char *)"";
        gone[i] = i % 3 ? begin(CHAT, 1000, 0, &q.base) : begin(TOKENIZE, 1000, 0, &x.base);
        CHECK(!gone[i]->is_finished);
        if (i % 2)
            turn();
    }
    for (size_t i = 0; i < 24; i++)
        if (!gone[i]->is_finished)
            dd_service_closed(service, &gone[i]->rpc);
    for (size_t i = 0; i < 24; i++)
        CHECK(gone[i]->is_finished);
    UNTIL(n_busy() == 0);
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    q.session_id = id;
    call *c = begin(CHAT, 1000, 0, &q.base);
    UNTIL(c->is_finished);
    CHECK_EQ(c->st.code, DD_OK);
    down();
}

TEST(turn_of_a_session_waits_for_the_one_whose_prompt_is_prepared)
{
    up("{\"reply\": \"x</think>\\n\\nyes.\"}");
    char id[64];
    (void)snprintf(id, sizeof id, "%s", new_session(true, false, 0, NULL));
    Deltad__V1__ChatRequest q = chat_of(long_text(60000));
    q.session_id = id;
    call *a = begin(CHAT, 1000, 0, &q.base);
    q = chat_of("Hi.");
    q.session_id = id;
    CHECK_STR(begin(CHAT, 1000, 0, &q.base)->st.reason, "SESSION_BUSY");
    Deltad__V1__CloseSessionRequest x = DELTAD__V1__CLOSE_SESSION_REQUEST__INIT;
    x.session_id = id;
    CHECK_STR(begin(SESSION_PATH("CloseSession"), 1000, 0, &x.base)->st.reason, "SESSION_BUSY");
    UNTIL(a->is_finished);
    CHECK_EQ(a->st.code, DD_OK);
    CHECK_EQ(begin(SESSION_PATH("CloseSession"), 1000, 0, &x.base)->st.code, DD_OK);
    down();
}

TEST(cancel_while_a_prompt_is_prepared_ends_the_stream_in_order)
{
    up(NULL);
    Deltad__V1__ChatRequest q = chat_of(long_text(60000));
    q.request_id = (char *)"mine";
    call *c = begin(CHAT, 1000, 0, &q.base);
    Deltad__V1__CancelRequest x = DELTAD__V1__CANCEL_REQUEST__INIT;
    x.request_id = (char *)"mine";
    CHECK_EQ(begin("/deltad.v1.InferenceService/Cancel", 1000, 0, &x.base)->st.code, DD_OK);
    UNTIL(c->is_finished);
    CHECK_EQ(c->st.code, DD_OK);
    CHECK_EQ(c->n_sent, 2);
    CHECK_EQ(reason(c), 5);
    down();
}

TEST(deadline_and_queue_time_that_pass_while_a_prompt_is_prepared_end_the_call)
{
    up(NULL);
    Deltad__V1__ChatRequest q = chat_of(long_text(1 << 20));
    call *a = begin(CHAT, 1000, de_now_ns() + 1000000, &q.base);
    scheduling.max_queue_opt_case = DELTAD__V1__SCHEDULING__MAX_QUEUE_OPT_MAX_QUEUE_NS;
    scheduling.max_queue_ns = 1000000;
    q.scheduling = &scheduling;
    call *b = begin(CHAT, 1000, 0, &q.base);
    UNTIL(a->is_finished && b->is_finished);
    CHECK_STR(a->st.reason, "DEADLINE");
    CHECK_STR(b->st.reason, "QUEUE_TIME");
    UNTIL(n_busy() == 0);
    down();
}

TEST(drain_while_texts_are_worked_on_refuses_them_and_waits_for_the_workers)
{
    up(NULL);
    call *c[16];
    for (size_t i = 0; i < 16; i++) {
        Deltad__V1__ChatRequest q = chat_of(long_text(300000));
        Deltad__V1__TokenizeRequest x = tokenize_of(long_text(300000));
        c[i] = i % 2 ? begin(CHAT, 1000, 0, &q.base) : begin(TOKENIZE, 1000, 0, &x.base);
    }
    dd_service_drain(service, on_drained, NULL);
    dd_service_abort_all(service);
    for (size_t i = 0; i < 16; i++) {
        CHECK(c[i]->is_finished);
        CHECK_STR(c[i]->st.reason, "DRAINING");
    }
    down();
}

/* They were taken without a bound, each with its megabytes. */
TEST(long_texts_are_bounded_for_one_user_and_for_all)
{
    up(NULL);
    config.limits.max_requests_per_uid = 4;
    Deltad__V1__TokenizeRequest x = tokenize_of(long_text(200000));
    unsigned n[3] = { 0 };
    for (size_t i = 0; i < 5; i++) {
        call *c = begin(TOKENIZE, 1000, 0, &x.base);
        CHECK_EQ(c->is_finished, i == 4);
        CHECK(!c->is_finished || strcmp(c->st.reason, "USER_LIMIT") == 0);
    }
    x = tokenize_of("short");
    CHECK_EQ(begin(TOKENIZE, 1000, 0, &x.base)->st.code, DD_OK);
    x = tokenize_of(long_text(200000));
    for (size_t i = 0; i < 100; i++) { /* each of another user */
        call *c = begin(TOKENIZE, 2000 + (uint32_t)i, 0, &x.base);
        n[!c->is_finished ? 0 : strcmp(c->st.reason, "QUEUE_FULL") == 0 ? 1 : 2]++;
    }
    CHECK_EQ(n[0], 60);
    CHECK_EQ(n[1], 40);
    call *last = calls[n_calls - 41];
    UNTIL(last->is_finished);
    CHECK_EQ(last->st.code, DD_OK);
    down();
}

static size_t n_listed(uint32_t uid, bool all)
{
    Deltad__V1__ListSessionsRequest q = DELTAD__V1__LIST_SESSIONS_REQUEST__INIT;
    q.all_users = all;
    call *c = begin(SESSION_PATH("ListSessions"), uid, 0, &q.base);
    if (!c->n_sent)
        return SIZE_MAX;
    Deltad__V1__ListSessionsResponse *r =
        deltad__v1__list_sessions_response__unpack(NULL, c->sent[0].len, c->sent[0].p);
    size_t n = r->n_sessions;
    deltad__v1__list_sessions_response__free_unpacked(r, NULL);
    return n;
}
static int close_code(const char *id, uint32_t uid)
{
    Deltad__V1__CloseSessionRequest q = DELTAD__V1__CLOSE_SESSION_REQUEST__INIT;
    q.session_id = (char *)id;
    return (int)begin(SESSION_PATH("CloseSession"), uid, 0, &q.base)->st.code;
}
static int cancel_code(const char *id, uint32_t uid)
{
    Deltad__V1__CancelRequest q = DELTAD__V1__CANCEL_REQUEST__INIT;
    q.request_id = (char *)id;
    return (int)begin("/deltad.v1.InferenceService/Cancel", uid, 0, &q.base)->st.code;
}
static int session_chat_code(const char *id, uint32_t uid)
{
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    q.session_id = (char *)id;
    call *c = begin(CHAT, uid, 0, &q.base);
    UNTIL(c->is_finished);
    return (int)c->st.code;
}

/* policy.admin_group promised closing, and gave listing. */
TEST(members_of_the_admin_group_see_and_end_what_is_others)
{
    up("{\"tokens_per_second\": 20}");
    char id[64];
    (void)snprintf(id, sizeof id, "%s", new_session(false, false, 0, NULL));
    CHECK_EQ(get_code(id, ADMIN), DD_OK);
    CHECK_EQ(n_listed(ADMIN, true), 1);
    CHECK_EQ(n_listed(ADMIN, false), 0);
    CHECK_EQ(n_listed(1001, true), SIZE_MAX);
    CHECK_EQ(session_chat_code(id, ADMIN), DD_NOT_FOUND);
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    q.request_id = (char *)"mine";
    call *c = begin(CHAT, 1000, 0, &q.base);
    CHECK_EQ(cancel_code("mine", 1001), DD_NOT_FOUND);
    CHECK_EQ(cancel_code("mine", ADMIN), DD_OK);
    UNTIL(c->is_finished);
    CHECK_EQ(reason(c), 5);
    CHECK_EQ(close_code(id, 1001), DD_NOT_FOUND);
    CHECK_EQ(close_code(id, ADMIN), DD_OK);
    CHECK_EQ(get_code(id, 1000), DD_NOT_FOUND);
    down();
}

/* They were all one user, who saw and closed everything that came by TCP. */
TEST(clients_on_tcp_reach_what_they_hold_the_id_of_only)
{
    up("{\"tokens_per_second\": 20}");
    char id[64], unix_id[64], own_id[64];
    (void)snprintf(id, sizeof id, "%s", new_session_of(TCP, false, false, 0, NULL));
    (void)snprintf(unix_id, sizeof unix_id, "%s", new_session(false, false, 0, NULL));
    CHECK_EQ(n_listed(TCP, false), 1);
    CHECK_EQ(n_listed(TCP + 1, false), 0);
    CHECK_EQ(n_listed(TCP, true), SIZE_MAX);
    CHECK_EQ(n_listed(1000, false), 1);
    CHECK_EQ(get_code(unix_id, TCP), DD_NOT_FOUND);
    CHECK_EQ(get_code(id, 1000), DD_NOT_FOUND);
    CHECK_EQ(session_chat_code(id, TCP + 1), DD_OK); /* reconnected */

    Deltad__V1__ChatRequest q = chat_of("Hi.");
    q.request_id = (char *)"mine";
    call *a = begin(CHAT, TCP, 0, &q.base);
    call *b = begin(CHAT, TCP + 1, 0, &q.base); /* the name is free there */
    CHECK(!b->is_finished);
    CHECK_STR(begin(CHAT, TCP, 0, &q.base)->st.reason, "REQUEST_ID_IN_USE");
    CHECK_EQ(cancel_code("mine", TCP + 2), DD_NOT_FOUND);
    CHECK_EQ(cancel_code("mine", TCP), DD_OK);
    UNTIL(a->is_finished);
    CHECK(!b->is_finished);

    q = chat_of("Hi.");
    call *c = begin(CHAT, TCP, 0, &q.base);
    UNTIL(c->n_sent);
    Deltad__V1__ChatEvent *e = event(c, 0);
    (void)snprintf(own_id, sizeof own_id, "%s", e->accepted->request_id);
    release(e);
    CHECK_EQ(cancel_code(own_id, 1000), DD_NOT_FOUND);
    CHECK_EQ(cancel_code(own_id, TCP + 2), DD_OK);
    UNTIL(c->is_finished);
    CHECK_EQ(close_code(id, TCP + 3), DD_OK);
    down();
}

TEST(requests_on_tcp_are_bounded_by_connection_and_by_address)
{
    up("{\"tokens_per_second\": 1}");
    config.limits.max_requests_per_uid = 5;
    config.limits.max_requests_per_connection = 3;
    Deltad__V1__ChatRequest q = chat_of("Hi.");
    for (uint32_t i = 0; i < 4; i++) { /* of one connection */
        call *c = begin(CHAT, TCP, 0, &q.base);
        CHECK_EQ(c->is_finished, i == 3);
        CHECK(!c->is_finished || strstr(c->st.message, "connection"));
    }
    for (uint32_t i = 0; i < 3; i++) { /* of another one, and of their address */
        call *c = begin(CHAT, TCP + 1, 0, &q.base);
        CHECK_EQ(c->is_finished, i == 2);
        CHECK(!c->is_finished || strstr(c->st.message, "address"));
    }
    CHECK(!begin(CHAT, TCP + 100, 0, &q.base)->is_finished);
    CHECK(!begin(CHAT, 1000, 0, &q.base)->is_finished);
    down();
}

static unsigned n_started, n_finished;
static bool is_open;
static void on_run_note(void *arg, const dd_note *n)
{
    (void)arg;
    is_open |= n->kind == DD_NOTE_READY;
    n_started += n->kind == DD_NOTE_STARTED;
    n_finished += n->kind == DD_NOTE_FINISHED;
}
static void run_until(const unsigned *what, unsigned n)
{
    uint64_t until = de_now_ns() + 5000000000u;
    while (*what < n && de_now_ns() < until)
        (void)uv_run(&loop, UV_RUN_NOWAIT);
    CHECK(*what >= n);
}

/* A pause that came between a cancel and the step that honours it kept the run for ever: with
 * nothing else to do the engine thread slept. */
TEST(run_that_is_cancelled_ends_although_it_is_paused_right_after)
{
    enum { RUNS = 400 };
    static const uint32_t ids[] = { 1, 2, 3 };
    dd_engine *e = NULL;
    delta_error err;
    (void)uv_loop_init(&loop);
    dd_config_defaults(&config);
    free(config.model.path);
    config.model.path = strdup(DEMO_MODEL_DIR);
    REQUIRE(dd_engine_new(&loop, &config, on_run_note, NULL, &e, &err) == 0);
    while (!is_open)
        (void)uv_run(&loop, UV_RUN_ONCE);
    delta_sampling sampling = delta_sampling_default(false);
    const delta_stopping endless = { .max_tokens = 20000, .ignore_eos = true };
    const delta_guide guide = { 0 };
    for (unsigned i = 0; i < RUNS && n_finished == i; i++) {
        dd_timeline *t = dd_timeline_new(e, 1, false);
        REQUIRE(t);
        const dd_run run = { .id = i,
                             .ids = ids,
                             .n_ids = 3,
                             .ctx_tokens = 24000,
                             .generate = true,
                             .sampling = &sampling,
                             .stopping = &endless,
                             .guide = &guide };
        dd_timeline_run(t, &run);
        run_until(&n_started, i + 1);
        dd_timeline_cancel(t);
        for (unsigned k = 0; k < i % 40 * 50; k++)
            __asm__ volatile("" ::: "memory");
        dd_timeline_pause(t, true);
        run_until(&n_finished, i + 1);
        if (n_finished > i)
            dd_timeline_free(t);
    }
    CHECK_EQ(n_finished, RUNS);
    dd_engine_free(e);
    (void)uv_run(&loop, UV_RUN_DEFAULT);
    dd_config_done(&config);
}
