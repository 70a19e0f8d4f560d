/* test_frame.c -- ttrpc's frames: any cuts, every rule, memory that follows what has come. */
#include "daemon/ttrpc/frame.h"
#include "support/tap.h"

static void feed(dd_frame_reader *r, const uint8_t *data, size_t n)
{
    uint8_t *to = dd_frame_room(r, n);
    if (!to)
        abort();
    memcpy(to, data, n);
    dd_frame_fed(r, n);
}

TEST(header_round_trip)
{
    static const uint8_t wanted[] = { 0, 0, 1, 2, 0xff, 0xee, 0xdd, 0xcc, 3, 5 };
    uint8_t got[DD_FRAME_HEADER];
    dd_frame_put(got, &(dd_frame){ 0x102, 0xffeeddcc, 3, 5 });
    CHECK_MEM(got, sizeof got, wanted, sizeof wanted);
    dd_frame f = dd_frame_get(wanted);
    CHECK_EQ(f.len, 0x102);
    CHECK_EQ(f.stream, 0xffeeddccU);
    CHECK_EQ(f.type, 3);
    CHECK_EQ(f.flags, 5);
}

TEST(frames_come_out_whole_in_any_cuts)
{
    uint8_t bytes[256];
    size_t n = 0;
    const dd_frame frames[] = { { 3, 1, 1, 1 }, { 0, 3, 1, 0 }, { 0, 1, 3, 5 }, { 100, 5, 1, 2 } };
    for (int i = 0; i < 4; i++) {
        dd_frame_put(bytes + n, &frames[i]);
        memset(bytes + n + DD_FRAME_HEADER, 'a' + i, frames[i].len);
        n += DD_FRAME_HEADER + frames[i].len;
    }
    for (size_t cut = 1; cut <= n; cut++) {
        dd_frame_reader r = { 0 };
        dd_frame f;
        const uint8_t *payload;
        int seen = 0;
        for (size_t at = 0; at < n; at += cut) {
            feed(&r, bytes + at, n - at < cut ? n - at : cut);
            while (dd_frame_next(&r, &f, &payload) == 1) {
                REQUIRE(seen < 4);
                CHECK_EQ(f.len, frames[seen].len);
                CHECK_EQ(f.stream, frames[seen].stream);
                for (uint32_t k = 0; k < f.len; k++)
                    CHECK_EQ(payload[k], 'a' + seen);
                seen++;
            }
        }
        CHECK(r.broken == NULL);
        CHECK_EQ(seen, 4);
        dd_frame_reader_done(&r);
    }
}

TEST(every_rule_is_kept)
{
    static const struct {
        dd_frame first, second; /* the second one breaks the rule */
    } cases[] = {
        { { 0, 1, 1, 0 }, { 0, 2, 1, 0 } },
        { { 0, 1, 1, 0 }, { 0, 0, 1, 0 } },
        { { 0, 3, 1, 0 }, { 0, 3, 1, 0 } },
        { { 0, 3, 1, 0 }, { 0, 1, 1, 0 } },
        { { 0, 3, 1, 0 }, { 0, 5, 3, 0 } },
        { { 0, 1, 1, 0 }, { 0, 3, 2, 0 } },
        { { 0, 1, 1, 0 }, { 0, 3, 0, 0 } },
        { { 0, 1, 1, 0 }, { 0, 3, 4, 0 } },
        { { 0, 1, 1, 0 }, { 0, 3, 1, 8 } },
        { { 0, 1, 1, 0 }, { 1, 1, 3, 4 } },
        { { 0, 1, 1, 0 }, { DD_FRAME_MAX + 1, 3, 1, 0 } },
        { { 0, 1, 1, 0 }, { UINT32_MAX, 3, 1, 0 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dd_frame_reader r = { 0 };
        uint8_t bytes[DD_FRAME_HEADER];
        dd_frame f;
        const uint8_t *payload;
        dd_frame_put(bytes, &cases[i].first);
        feed(&r, bytes, sizeof bytes);
        CHECK_EQ(dd_frame_next(&r, &f, &payload), 1);
        dd_frame_put(bytes, &cases[i].second);
        feed(&r, bytes, sizeof bytes);
        CHECK_EQ(dd_frame_next(&r, &f, &payload), -1);
        CHECK(r.broken && r.broken[0]);
        CHECK_EQ(dd_frame_next(&r, &f, &payload), -1); /* for good */
        dd_frame_reader_done(&r);
    }
}

TEST(the_longest_frame_passes_and_its_memory_goes)
{
    dd_frame_reader r = { 0 };
    uint8_t bytes[16384] = { 0 };
    dd_frame f;
    const uint8_t *payload;
    dd_frame_put(bytes, &(dd_frame){ DD_FRAME_MAX, 1, 1, 1 });
    feed(&r, bytes, DD_FRAME_HEADER);
    CHECK(r.size < 1024); /* a promise costs nothing */
    memset(bytes, 7, sizeof bytes);
    for (int i = 0; i < DD_FRAME_MAX / 16384; i++) {
        CHECK_EQ(dd_frame_next(&r, &f, &payload), 0);
        feed(&r, bytes, sizeof bytes);
    }
    REQUIRE(dd_frame_next(&r, &f, &payload) == 1);
    CHECK_EQ(f.len, DD_FRAME_MAX);
    CHECK_EQ(payload[DD_FRAME_MAX - 1], 7);
    CHECK(dd_frame_room(&r, 16384) != NULL);
    CHECK(r.size <= 16384);
    dd_frame_reader_done(&r);
}
