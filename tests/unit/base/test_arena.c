/* test_arena.c -- bump allocation: alignment, limits, overflow. */
#include "base/arena.h"
#include "base/bits.h"
#include "support/tap.h"

TEST(arena_hands_out_aligned_memory_that_does_not_overlap)
{
    de_arena a;
    uint8_t *p[500];
    de_arena_init(&a, 10 << 20);
    for (size_t i = 0; i < 500; i++) {
        p[i] = de_arena_alloc(&a, i * 13 % 5000);
        REQUIRE(p[i] != NULL);
        CHECK_EQ((uintptr_t)p[i] % 16, 0);
        memset(p[i], (int)i, i * 13 % 5000);
    }
    for (size_t i = 0; i < 500; i++)
        for (size_t k = 0; k < i * 13 % 5000; k++)
            if (p[i][k] != (uint8_t)i) {
                TAP_FAIL("allocation %zu was written over", i);
                break;
            }
    de_arena_done(&a);
    CHECK_EQ(a.used, 0);
}

TEST(arena_zalloc_gives_zeros_also_after_use)
{
    de_arena a;
    de_arena_init(&a, 1 << 20);
    for (int round = 0; round < 2; round++) {
        memset(de_arena_alloc(&a, 3000), 0xFF, 3000);
        const uint8_t *z = de_arena_zalloc(&a, 777);
        for (int i = 0; i < 777; i++)
            CHECK_EQ(z[i], 0);
        de_arena_done(&a); /* keeps its limit and may be used again */
    }
}

TEST(arena_refuses_past_its_limit_and_stays_usable)
{
    de_arena a;
    de_arena_init(&a, 1000);
    CHECK(de_arena_alloc(&a, 1001) == NULL);
    CHECK(de_arena_alloc(&a, 600) != NULL);
    CHECK(de_arena_alloc(&a, 600) == NULL);
    CHECK(de_arena_alloc(&a, 400) != NULL);
    CHECK(de_arena_alloc(&a, 1) == NULL);
    CHECK_EQ(a.used, 1000);
    de_arena_done(&a);
    CHECK(de_arena_alloc(&a, 1000) != NULL);
    de_arena_done(&a);
}

/* Sizes that wrap when they are rounded up to the alignment must not give a small block. */
TEST(arena_refuses_sizes_that_overflow)
{
    de_arena a;
    de_arena_init(&a, SIZE_MAX);
    for (size_t i = 0; i < 64; i++)
        CHECK(de_arena_alloc(&a, SIZE_MAX - i) == NULL);
    CHECK(de_arena_array(&a, SIZE_MAX / 2, 3) == NULL);
    CHECK(de_arena_array(&a, (size_t)1 << 33, (size_t)1 << 33) == NULL);
    CHECK(de_arena_strndup(&a, "", SIZE_MAX) == NULL);
    CHECK(de_arena_array(&a, 10, 10) != NULL);
    CHECK(de_arena_array(&a, 0, 10) != NULL);
    CHECK_STR(de_arena_strndup(&a, "abcdef", 3), "abc");
    CHECK_STR(de_arena_strndup(&a, NULL, 0), "");
    de_arena_done(&a);
}

TEST(bits_arithmetic_at_its_ends)
{
    uint64_t r = 7;
    CHECK(!de_add_u64(UINT64_MAX, 1, &r) && r == 7);
    CHECK(de_add_u64(UINT64_MAX, 0, &r) && r == UINT64_MAX);
    CHECK(!de_mul_u64(1ull << 32, 1ull << 32, &r) && r == UINT64_MAX);
    CHECK(de_mul_u64(UINT64_MAX, 1, &r) && r == UINT64_MAX);
    CHECK(de_mul_u64(UINT64_MAX, 0, &r) && r == 0);
    CHECK(de_ceil_div(UINT64_MAX, 2) == 1ull << 63);
    CHECK_EQ(de_ceil_div(0, 3), 0);
    CHECK_EQ(de_ceil_div(9, 3), 3);
    CHECK_EQ(de_ceil_div(10, 3), 4);
    CHECK_EQ(de_align_up(0, 16), 0);
    CHECK_EQ(de_align_up(1, 16), 16);
    CHECK_EQ(de_align_up(32, 16), 32);
}
