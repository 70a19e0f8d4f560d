/* The third tier by itself: what goes first, what goes together, and whose states are whose. */
#include "support/tap.h"

#include <dirent.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cache/store.h"

enum { PAGE = 4, PAGE_BYTES = 64, SLOT_BYTES = 3000 };

static char folder[40];
static uint8_t *to_disk, *from_disk;

static de_record_kind kind_of(uint64_t model)
{
    de_record_kind k;
    memset(&k, 0, sizeof k);
    k.model = model;
    k.slot_bytes = SLOT_BYTES;
    k.page_bytes = PAGE_BYTES;
    k.page_tokens = PAGE;
    (void)snprintf(k.name, sizeof k.name, "model %d", (int)model);
    return k;
}

static de_store *open_store(uint64_t model, uint64_t max_bytes, de_store_found *ret_found)
{
    const de_record_kind k = kind_of(model);
    if (!folder[0]) {
        (void)snprintf(folder, sizeof folder, "/tmp/test-store-XXXXXX");
        CHECK(mkdtemp(folder) != NULL);
        to_disk = calloc(1, de_store_buffer_bytes(&k));
        from_disk = calloc(DE_STORE_READERS, de_store_buffer_bytes(&k));
    }
    de_store *st = NULL;
    const de_store_options o = { folder, max_bytes, k, to_disk, from_disk };
    CHECK_EQ(de_store_open(&o, &st, ret_found, NULL), 0);
    return st;
}

static void pause_ms(long ms)
{
    (void)nanosleep(&(struct timespec){ .tv_nsec = ms * 1000000 }, NULL);
}

/* What a page and a state hold: the tokens say it. */
static uint8_t of_page(const uint32_t *ids, uint32_t page)
{
    return (uint8_t)(ids[page * PAGE] * 7 + page);
}

static int put(de_store *st, const uint32_t *ids, uint32_t n, uint64_t *ret_id)
{
    uint32_t first = 0;
    uint64_t bytes = 0;
    int r = de_store_write_begin(st, 1, ids, n, NULL, &first, &bytes, NULL);
    if (r < 0)
        return r;
    for (;;) {
        const enum de_store_phase phase = de_store_write_phase(st);
        if (phase == DE_STORE_DONE || phase == DE_STORE_FAILED)
            break;
        if (phase == DE_STORE_YOURS) {
            uint32_t page, k;
            de_store_write_wants(st, &page, &k);
            for (uint32_t i = 0; i < k; i++)
                memset(to_disk + i * PAGE_BYTES, of_page(ids, page + i), PAGE_BYTES);
            if (k == 0)
                memset(to_disk, (int)(n & 255), SLOT_BYTES);
            de_store_write_put(st);
        }
        pause_ms(0);
    }
    pause_ms(2); /* so that times of use differ */
    return de_store_write_end(st, ret_id, NULL);
}

/* Reads all of a record's prefix and looks at every byte. */
static int get(de_store *st, uint64_t id, const uint32_t *ids, uint32_t n)
{
    uint32_t seen = 0;
    if (de_store_read_begin(st, id, 0, NULL) < 0)
        return DELTA_ENOTFOUND;
    for (;;) {
        const enum de_store_phase phase = de_store_read_phase(st);
        if (phase == DE_STORE_DONE || phase == DE_STORE_FAILED)
            break;
        if (phase == DE_STORE_YOURS) {
            uint32_t page, k;
            const uint8_t *has = de_store_read_has(st, &page, &k);
            for (uint32_t i = 0; i < k; i++)
                CHECK(has[i * PAGE_BYTES] == of_page(ids, page + i) &&
                      has[i * PAGE_BYTES + PAGE_BYTES - 1] == of_page(ids, page + i));
            CHECK(k > 0 || has[SLOT_BYTES - 1] == (n & 255));
            seen += k;
            de_store_read_next(st);
        }
        pause_ms(0);
    }
    const int r = de_store_read_end(st, NULL);
    CHECK(r < 0 || seen == (n + PAGE - 1) / PAGE);
    return r;
}

static uint32_t found(const de_store *st, const uint32_t *ids, uint32_t n)
{
    uint64_t id = 0;
    return de_store_find(st, 1, ids, n, n, &id);
}

static char path[300];
static const char *file_of(uint64_t id)
{
    (void)snprintf(path, sizeof path, "%s/%016llx.state", folder, (unsigned long long)id);
    return path;
}

static void clean(void)
{
    DIR *d = opendir(folder);
    for (struct dirent *x; d && (x = readdir(d));)
        if (x->d_name[0] != '.') {
            (void)snprintf(path, sizeof path, "%s/%s", folder, x->d_name);
            (void)unlink(path);
        }
    if (d)
        (void)closedir(d);
    (void)rmdir(folder);
    folder[0] = 0;
    free(to_disk);
    free(from_disk);
}

static void count(uint32_t *ids, uint32_t n, uint32_t salt)
{
    for (uint32_t i = 0; i < n; i++)
        ids[i] = salt + i * 3;
}

TEST(a_chain_is_read_from_all_its_records_and_goes_with_the_one_that_is_damaged)
{
    uint32_t ids[60], other[60];
    uint64_t id[6], branch[2], apart;
    de_store_found f;
    de_store *st = open_store(1, 1u << 20, &f);
    count(ids, 60, 1);
    for (uint32_t i = 0; i < 6; i++)
        CHECK_EQ(put(st, ids, 7 + i * 9, &id[i]), 0); /* in the middle of pages */
    memcpy(other, ids, sizeof other);
    other[20] = 999;
    CHECK_EQ(put(st, other, 40, &branch[0]), 0); /* behind the second */
    CHECK_EQ(put(st, other, 50, &branch[1]), 0);
    count(other, 60, 2);
    CHECK_EQ(put(st, other, 30, &apart), 0);
    for (int again = 0; again < 2; again++) {
        for (uint32_t i = 0; i < 6; i++) {
            CHECK_EQ(found(st, ids, 7 + i * 9 + 8), 7 + i * 9);
            CHECK_EQ(get(st, id[i], ids, 7 + i * 9), 0);
        }
        if (again)
            break;
        de_store_close(st);
        st = open_store(1, 1u << 20, &f);
        CHECK(f.damaged == 0 && f.torn == 0);
    }
    /* a page of the second: all behind it, on both branches, cannot be read any more */
    FILE *file = fopen(file_of(id[1]), "r+b");
    CHECK(file && fseek(file, 4096 + 70, SEEK_SET) == 0 && fputc(77, file) == 77 &&
          fclose(file) == 0);
    CHECK_EQ(get(st, id[5], ids, 7 + 5 * 9), DELTA_EFORMAT);
    CHECK_EQ(found(st, ids, 60), 7);
    CHECK_EQ(get(st, id[0], ids, 7), 0);
    CHECK_EQ(found(st, other, 60), 30);
    de_store_stats s;
    de_store_stats_get(st, &s);
    CHECK_EQ(s.records, 2);
    for (uint32_t i = 1; i < 6; i++)
        CHECK(access(file_of(id[i]), F_OK) < 0);
    CHECK(access(file_of(branch[1]), F_OK) < 0);
    de_store_close(st);
    /* without its parent nothing of a chain is there */
    st = open_store(1, 1u << 20, &f);
    CHECK_EQ(put(st, ids, 20, &id[1]), 0);
    de_store_close(st);
    CHECK_EQ(unlink(file_of(id[0])), 0);
    st = open_store(1, 1u << 20, &f);
    CHECK_EQ(f.damaged, 1);
    CHECK(strstr(f.text, "its parent is gone"));
    CHECK_EQ(found(st, ids, 60), 0);
    de_store_close(st);
    clean();
}

TEST(what_was_used_longest_ago_goes_first_and_parents_lose_their_state_alone)
{
    uint32_t a[40], b[40], c[40];
    uint64_t id_a, id_a2, id_b, id_c;
    de_store_found f;
    struct stat file;
    count(a, 40, 1);
    count(b, 40, 1000);
    count(c, 40, 2000);
    const uint64_t one = 4096 + 10 * PAGE_BYTES + SLOT_BYTES; /* of 40 tokens */
    const uint64_t most = 27000;                              /* all four are 29856 */
    de_store *st = open_store(1, most, &f);
    CHECK_EQ(put(st, a, 20, &id_a), 0);
    CHECK_EQ(put(st, a, 40, &id_a2), 0);
    CHECK_EQ(put(st, b, 40, &id_b), 0);
    CHECK_EQ(stat(file_of(id_a), &file), 0);
    const off_t whole = file.st_size;
    CHECK_EQ(put(st, c, 12, &id_c), 0); /* the state of a's first is enough */
    CHECK_EQ(stat(file_of(id_a), &file), 0);
    CHECK_EQ(file.st_size, whole - SLOT_BYTES);
    CHECK_EQ(found(st, a, 30), 0);
    CHECK_EQ(get(st, id_a2, a, 40), 0);
    CHECK_EQ(found(st, b, 40), 40);
    de_store_stats s;
    de_store_stats_get(st, &s);
    CHECK(s.bytes <= most && s.evictions == 1 && s.records == 4);
    de_store_close(st);
    st = open_store(1, 1u << 20, &f); /* a cut one is no damage */
    CHECK_EQ(f.damaged, 0);
    CHECK_EQ(get(st, id_a2, a, 40), 0);
    CHECK_EQ(put(st, a, 20, &id_a), 0); /* and can be written again */
    CHECK_EQ(found(st, a, 30), 20);
    CHECK_EQ(get(st, id_a, a, 20), 0);
    de_store_close(st);
    st = open_store(1, 16000, &f); /* less than before: what was written last stays */
    de_store_stats_get(st, &s);
    CHECK(s.bytes <= 16000 && s.records > 0);
    CHECK_EQ(found(st, a, 30), 20);
    CHECK_EQ(found(st, b, 40), 0);
    de_store_close(st);
    clean();
    st = open_store(1, one - 1, &f);
    CHECK_EQ(put(st, a, 40, &id_a), DELTA_ELIMIT);
    de_store_close(st);
    clean();
}

TEST(records_of_another_model_stay_until_the_room_is_needed)
{
    uint32_t a[40], b[40];
    uint64_t id;
    de_store_found f;
    de_store_stats s;
    count(a, 40, 1);
    count(b, 40, 1000);
    const uint64_t one = 4096 + 10 * PAGE_BYTES + SLOT_BYTES;
    de_store *st = open_store(1, 3 * one, &f);
    CHECK_EQ(put(st, a, 40, &id), 0);
    de_store_close(st);
    st = open_store(2, 3 * one, &f);
    de_store_stats_get(st, &s);
    CHECK(s.records == 0 && s.foreign == 1 && s.bytes == one);
    CHECK_EQ(found(st, a, 40), 0);
    CHECK_EQ(put(st, a, 40, &id), 0);
    de_store_close(st);
    st = open_store(1, 3 * one, &f);
    CHECK_EQ(found(st, a, 40), 40);
    CHECK_EQ(put(st, b, 40, &id), 0);
    CHECK_EQ(put(st, b, 39, &id), 0); /* the other's goes, though it was used last */
    de_store_stats_get(st, &s);
    CHECK(s.records == 3 && s.foreign == 0);
    CHECK_EQ(found(st, a, 40), 40);
    de_store_forget(st, 1, b, 40, 39);
    CHECK_EQ(found(st, b, 40), 39);
    de_store_forget(st, 1, b, 40, 0);
    CHECK_EQ(found(st, b, 40), 0);
    CHECK_EQ(found(st, a, 40), 40);
    de_store_close(st);
    clean();
}
