/* Out of memory while a request is decoded: it is refused with a status, and nothing leaks. */
#include "support/tap.h"

#include "support/failing_malloc.h"

#include "daemon/codec.h"
#include "daemon/config.h"

static dd_wire_out chat;

static void put_message(dd_wire_out *o, uint32_t field, dd_wire_out *inner)
{
    dd_wire_put_bytes(o, field, inner->data, inner->len);
    free(inner->data);
    memset(inner, 0, sizeof *inner);
}

/* A ChatRequest with something of everything that is unpacked into memory. */
static void make_chat(void)
{
    static const char kwargs[] = "{\"enable_thinking\": true}";
    dd_wire_out part = { 0 }, message = { 0 }, tool = { 0 };
    for (int i = 0; i < 40; i++) {
        dd_wire_put_bytes(&part, 1, "some text of a part", 19);
        dd_wire_put_varint(&message, 1, 2);
        put_message(&message, 2, &part);
        put_message(&chat, 5, &message);
        dd_wire_put_bytes(&tool, 1, "tool", 4);
        tool.data[tool.len - 1] = (uint8_t)('A' + i % 26);
        dd_wire_put_bytes(&tool, 2, "what it does", 12);
        dd_wire_put_bytes(&tool, 3, "{\"type\":\"object\"}", 17);
        put_message(&chat, 6, &tool);
    }
    dd_wire_put_bytes(&part, 3, "stop", 4);
    put_message(&chat, 11, &part);
    dd_wire_put_bytes(&chat, 17, kwargs, sizeof kwargs - 1);
}

static int decode(delta_error *err)
{
    dd_request r;
    dd_status st = { 0 };
    const int e = dd_request_decode(DD_REQ_CHAT, chat.data, chat.len, &r, &st);
    dd_request_done(&r);
    if (e == 0)
        return 0;
    CHECK_EQ((int)st.code, (int)DD_INVALID_ARGUMENT);
    CHECK(st.reason && st.message[0]);
    return delta_fail(err, DELTA_ENOMEM, "%s", st.message); /* a refusal is what is looked for */
}

TEST(a_request_is_refused_where_memory_ends)
{
    make_chat();
    fm_torture("request", decode, 2000, 1, false);
    fm_torture("request, all after", decode, 2000, 1, true);
    free(chat.data);
}
