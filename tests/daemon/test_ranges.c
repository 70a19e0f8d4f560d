/* test_ranges.c -- every row of the validator table: under it, its ends, over it. What is refused
 * names its field. The numbers stand here again on purpose: they are the interface (docs/PROTOCOL.md). */
#include "daemon/codec.h"
#include "support/tap.h"

enum how {
    FLOAT_OF_SAMPLING, /* field of ChatRequest.sampling */
    BIAS,              /* ChatRequest.sampling.logit_bias[0].bias */
    N_BIAS,
    MAX_TOKENS,
    N_STOP,
    STOP_BYTES,
    N_STOP_IDS,
    TOP_LOGPROBS,
    ID_BYTES,   /* request_id */
    NAME_BYTES, /* CreateSessionRequest.name */
    CTX_TOKENS, /* CreateSessionRequest.ctx_tokens */
    N_MESSAGES,
    N_TOOLS,
};

typedef struct row {
    const char *path;
    enum how how;
    uint32_t field;
    double min, max; /* the least and the greatest that are taken */
    bool is_float, is_open_below;
} row;

static const row rows[] = {
    { "sampling.temperature", FLOAT_OF_SAMPLING, 1, 0, 100, true, false },
    { "sampling.top_p", FLOAT_OF_SAMPLING, 3, 0, 1, true, true },
    { "sampling.min_p", FLOAT_OF_SAMPLING, 4, 0, 1, true, false },
    { "sampling.presence_penalty", FLOAT_OF_SAMPLING, 5, -2, 2, true, false },
    { "sampling.frequency_penalty", FLOAT_OF_SAMPLING, 6, -2, 2, true, false },
    { "sampling.repetition_penalty", FLOAT_OF_SAMPLING, 7, 0, 10, true, true },
    { "sampling.logit_bias.bias", BIAS, 0, -100, 100, true, false },
    { "sampling.logit_bias", N_BIAS, 0, 0, 1024, false, false },
    { "stopping.max_tokens", MAX_TOKENS, 0, 1, 4294967295.0, false, false },
    { "stopping.stop", N_STOP, 0, 0, 16, false, false },
    { "stopping.stop", STOP_BYTES, 0, 1, 256, false, false },
    { "stopping.stop_token_ids", N_STOP_IDS, 0, 0, 64, false, false },
    { "logprobs.top", TOP_LOGPROBS, 0, 0, 20, false, false },
    { "request_id", ID_BYTES, 0, 0, 63, false, false },
    { "name", NAME_BYTES, 0, 0, 256, false, false },
    { "ctx_tokens", CTX_TOKENS, 0, 1, 4294967295.0, false, false },
    { "messages", N_MESSAGES, 0, 1, 65536, false, false },
    { "tools", N_TOOLS, 0, 0, 4096, false, false },
};

static void put_message(dd_wire_out *o, uint32_t field, dd_wire_out *inner)
{
    dd_wire_put_bytes(o, field, inner->data, inner->len);
    free(inner->data);
    memset(inner, 0, sizeof *inner);
}

static void put_float(dd_wire_out *o, uint32_t field, float f)
{
    /* the tag of a 32-bit field is a varint of a type that dd_wire_put_varint() does not write */
    const uint8_t tag = (uint8_t)(field << 3 | 5);
    uint8_t *p = realloc(o->data, o->len + 5);
    if (!p)
        abort();
    p[o->len] = tag;
    memcpy(p + o->len + 1, &f, 4);
    o->data = p;
    o->len += 5;
}

static void put_letters(dd_wire_out *o, uint32_t field, size_t n)
{
    char *text = malloc(n + 1);
    if (!text)
        abort();
    memset(text, 'a', n);
    dd_wire_put_bytes(o, field, text, n);
    free(text);
}

/* A request in which the thing of the row has this value, or comes so many times. */
static dd_wire_out request(const row *x, double value, enum dd_request_kind *ret_kind)
{
    dd_wire_out o = { 0 }, part = { 0 }, inner = { 0 };
    const uint64_t n = value > 0 ? (uint64_t)value : 0;
    *ret_kind = x->how == NAME_BYTES || x->how == CTX_TOKENS ? DD_REQ_CREATE : DD_REQ_CHAT;
    if (*ret_kind == DD_REQ_CHAT && x->how != N_MESSAGES) {
        dd_wire_put_varint(&part, 1, 2);
        put_message(&o, 5, &part);
    }
    switch (x->how) {
    case FLOAT_OF_SAMPLING:
        put_float(&part, x->field, (float)value);
        put_message(&o, 10, &part);
        break;
    case BIAS:
        put_float(&inner, 2, (float)value);
        put_message(&part, 9, &inner);
        put_message(&o, 10, &part);
        break;
    case N_BIAS:
        for (uint64_t i = 0; i < n; i++) {
            dd_wire_put_varint(&inner, 1, i);
            put_message(&part, 9, &inner);
        }
        put_message(&o, 10, &part);
        break;
    case MAX_TOKENS:
        dd_wire_put_varint(&part, 1, n);
        put_message(&o, 11, &part);
        break;
    case N_STOP:
        for (uint64_t i = 0; i < n; i++)
            put_letters(&part, 3, 1);
        put_message(&o, 11, &part);
        break;
    case STOP_BYTES:
        put_letters(&part, 3, n);
        put_message(&o, 11, &part);
        break;
    case N_STOP_IDS:
        for (uint64_t i = 0; i < n; i++)
            dd_wire_put_varint(&part, 4, 7);
        put_message(&o, 11, &part);
        break;
    case TOP_LOGPROBS:
        dd_wire_put_varint(&part, 1, 1);
        dd_wire_put_varint(&part, 2, n);
        put_message(&o, 13, &part);
        break;
    case ID_BYTES:
        put_letters(&o, 1, n);
        break;
    case NAME_BYTES:
        put_letters(&o, 1, n);
        break;
    case CTX_TOKENS:
        dd_wire_put_varint(&o, 5, n);
        break;
    case N_MESSAGES:
        for (uint64_t i = 0; i < n; i++) {
            dd_wire_put_varint(&part, 1, 2);
            put_letters(&inner, 1, 60); /* memory is granted by the size of the message */
            put_message(&part, 2, &inner);
            put_message(&o, 5, &part);
        }
        break;
    case N_TOOLS:
        for (uint64_t i = 0; i < n; i++) {
            char name[24];
            const int len = snprintf(name, sizeof name, "t%llu", (unsigned long long)i);
            dd_wire_put_bytes(&part, 1, name, (size_t)len);
            put_message(&o, 6, &part);
        }
        break;
    }
    return o;
}

static void check(const row *x, double value, bool is_good)
{
    dd_request r;
    dd_status st = { 0 };
    enum dd_request_kind kind;
    dd_wire_out o = request(x, value, &kind);
    const int got = dd_request_decode(kind, o.data, o.len, &r, &st);
    if (is_good && got < 0)
        TAP_FAIL("%s of %.9g is refused: %s", x->path, value, st.message);
    if (!is_good && got == 0)
        TAP_FAIL("%s of %.9g is taken", x->path, value);
    if (!is_good && got < 0) {
        CHECK_EQ((int)st.code, (int)DD_INVALID_ARGUMENT);
        CHECK_STR(st.reason, "FIELD_INVALID");
        CHECK_STR(st.field, x->path);
        CHECK(strncmp(st.message, x->path, strlen(x->path)) == 0);
    }
    dd_request_done(&r);
    free(o.data);
}

TEST(each_range_takes_its_ends_and_refuses_what_lies_beyond_by_name)
{
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const row *x = &rows[i];
        if (x->is_float) {
            const float min = (float)x->min, max = (float)x->max;
            check(x, (double)nextafterf(min, -INFINITY), false);
            check(x, x->min, !x->is_open_below);
            check(x, (double)nextafterf(min, INFINITY), true);
            check(x, x->max, true);
            check(x, (double)nextafterf(max, INFINITY), false);
            check(x, NAN, false);
            check(x, INFINITY, false);
            check(x, -INFINITY, false);
            continue;
        }
        if (x->min > 0)
            check(x, x->min - 1, false);
        check(x, x->min, true);
        check(x, x->max, true);
        if (x->max < 4294967295.0)
            check(x, x->max + 1, false);
    }
}

TEST(alternatives_without_logprobs_are_refused)
{
    dd_request r;
    dd_status st = { 0 };
    static const uint8_t top_only[] = { 13 << 3 | 2, 2, 2 << 3, 1 };
    CHECK_EQ(dd_request_decode(DD_REQ_CHAT, top_only, sizeof top_only, &r, &st), -1);
    CHECK_STR(st.field, "logprobs.top");
    dd_request_done(&r);
}
