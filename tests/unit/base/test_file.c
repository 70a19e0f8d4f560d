/* test_file.c -- small files: bounded, and no error without the path. */
#include "base/file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "support/tap.h"

static char dir[64], path[96];

static void make(const char *name)
{
    const char *tmp = getenv("TMPDIR");
    (void)snprintf(dir, sizeof dir, "%.30s/delta-test-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir))
        exit(2);
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
}

static void clear(void)
{
    (void)unlink(path);
    (void)rmdir(path);
    (void)rmdir(dir);
}

static void put(const char *bytes, size_t n)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, bytes, n) != (ssize_t)n)
        exit(2);
    close(fd);
}

TEST(file_read_gives_all_bytes_and_a_nul)
{
    char *text;
    size_t len;
    make("f");
    put("a\0b\n", 4);
    REQUIRE(de_file_read(path, 4, &text, &len, NULL) == 0);
    CHECK_MEM(text, len, "a\0b\n", 4);
    CHECK_EQ(text[4], 0);
    free(text);
    put("", 0);
    REQUIRE(de_file_read(path, 0, &text, &len, NULL) == 0);
    CHECK_EQ(len, 0);
    CHECK_STR(text, "");
    free(text);
    clear();
}

static void check_refused(size_t max, int code)
{
    char *text = (char *)path;
    size_t len = 77;
    delta_error err = { 0 };
    CHECK_EQ(de_file_read(path, max, &text, &len, &err), code);
    CHECK(strstr(err.text, path) != NULL);
    CHECK(text == path && len == 77); /* untouched */
}

TEST(file_read_refuses_with_the_path_named)
{
    make("f");
    check_refused(10, DELTA_ENOTFOUND);
    put("12345", 5);
    check_refused(4, DELTA_ELIMIT);
    (void)unlink(path);
    (void)mkdir(path, 0700);
    check_refused(10, DELTA_EIO);
    (void)rmdir(path);
    (void)mkfifo(path, 0600); /* must not be waited for */
    check_refused(10, DELTA_EIO);
    clear();
}

TEST(path_join_puts_a_slash_between)
{
    char *p = de_path_join("a/b", "c");
    CHECK_STR(p, "a/b/c");
    free(p);
    p = de_path_join("", "");
    CHECK_STR(p, "/");
    free(p);
}
