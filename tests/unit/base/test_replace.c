/* A file is replaced whole or not at all: by processes that are killed anywhere, and on a full disk. */
#include "support/tap.h"

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/file.h"

enum { KILLS = 500, SIZE = 300000 };

__attribute__((constructor)) static void slow(void)
{
    tap_timeout_s = 300;
}

static char folder[] = "/tmp/test-replace-XXXXXX";
static char path[64];

static void setup(void)
{
    if (!path[0]) {
        CHECK(mkdtemp(folder) != NULL);
        (void)snprintf(path, sizeof path, "%s/file", folder);
    }
}

/* Version v of the content: its length and every byte depend on it. */
static size_t content(uint32_t v, uint8_t *to)
{
    const size_t n = SIZE / 2 + v * 2654435761u % (SIZE / 2);
    for (size_t i = 0; i < n; i++)
        to[i] = (uint8_t)(i * 31 + v);
    memcpy(to, &v, sizeof v);
    return n;
}

static uint32_t version_of(const char *text, size_t len)
{
    static uint8_t want[SIZE + 8];
    uint32_t v = 0;
    CHECK(len >= sizeof v);
    memcpy(&v, text, sizeof v);
    const size_t n = content(v, want);
    CHECK_MEM((const uint8_t *)text, len, want, n);
    return v;
}

TEST(a_killed_writer_leaves_the_old_file_or_the_new_one)
{
    static uint8_t bytes[SIZE + 8];
    setup();
    CHECK_EQ(de_file_replace(path, bytes, content(0, bytes), NULL), 0);
    uint32_t last = 0, torn = 0, changed = 0;
    uint64_t random = de_now_ns();
    printf("# seed %llu\n", (unsigned long long)random);
    for (int k = 0; k < KILLS; k++) {
        const pid_t child = fork();
        if (child == 0) {
            for (uint32_t v = last + 1;; v++)
                if (de_file_replace(path, bytes, content(v, bytes), NULL) < 0)
                    _exit(1);
        }
        random = random * 6364136223846793005u + 1442695040888963407u;
        (void)usleep((useconds_t)(random >> 33) % 6000);
        CHECK_EQ(kill(child, SIGKILL), 0);
        int status = 0;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK(WIFSIGNALED(status));
        char *text = NULL, new[80];
        size_t len = 0;
        CHECK_EQ(de_file_read(path, SIZE * 2, &text, &len, NULL), 0);
        const uint32_t v = version_of(text, len);
        CHECK(v >= last);
        changed += v > last;
        last = v;
        free(text);
        struct stat st;
        (void)snprintf(new, sizeof new, "%s.new", path);
        torn += stat(new, &st) == 0;
    }
    printf("# %u versions; %u of %d kills came while one was written\n", last, torn, KILLS);
    CHECK(torn > KILLS / 20 && changed > KILLS / 20);
}

TEST(a_full_disk_leaves_the_old_file_and_says_so)
{
    static uint8_t bytes[SIZE + 8];
    setup();
    CHECK_EQ(de_file_replace(path, bytes, content(7, bytes), NULL), 0);
    (void)signal(SIGXFSZ, SIG_IGN);
    struct rlimit old;
    CHECK_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
    const struct rlimit small = { 100000, old.rlim_max };
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    delta_error err = { 0 };
    CHECK_EQ(de_file_replace(path, bytes, content(8, bytes), &err), DELTA_ELIMIT);
    CHECK(strstr(err.text, "file.new: writing: File too large") != NULL);
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
    char *text = NULL;
    size_t len = 0;
    CHECK_EQ(de_file_read(path, SIZE * 2, &text, &len, NULL), 0);
    CHECK_EQ(version_of(text, len), 7);
    free(text);
    char new[80];
    struct stat st;
    (void)snprintf(new, sizeof new, "%s.new", path);
    CHECK(stat(new, &st) < 0);
    CHECK_EQ(de_file_replace("/nowhere/at/all", bytes, 3, &err), DELTA_EIO);
    (void)unlink(path);
    (void)rmdir(folder);
}
