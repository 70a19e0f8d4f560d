/* test_log.c -- lines of the log: form, escapes, limits, and that nothing waits. */
#include "daemon/log.h"
#include "support/tap.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>

/* stderr becomes fd; what was read from the other end. */
static char got[1 << 17];

static void read_all(int fd)
{
    size_t len = 0;
    for (;;) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        if (poll(&p, 1, 0) != 1)
            break;
        ssize_t n = read(fd, got + len, sizeof got - 1 - len);
        if (n <= 0)
            break;
        len += (size_t)n;
    }
    got[len] = 0;
}

static int log_to_pipe(void)
{
    int fds[2];
    if (pipe(fds) < 0 || dup2(fds[1], STDERR_FILENO) < 0)
        exit(2);
    (void)close(fds[1]);
    (void)unsetenv("JOURNAL_STREAM");
    dd_log_init(DD_LOG_INFO);
    return fds[0];
}

TEST(line_in_a_pipe_has_time_and_level)
{
    int fd = log_to_pipe();
    errno = EBADF;
    dd_log(DD_LOG_WARNING, "%s is %d", "x", 7);
    CHECK_EQ(errno, EBADF);
    read_all(fd);
    int year = 0, n = 0;
    CHECK_EQ(sscanf(got, "%4d-%*2d-%*2dT%*2d:%*2d:%*2d.%*3dZ warning x is 7\n%n", &year, &n), 1);
    CHECK(year >= 2026);
    CHECK_EQ(n, strlen(got));
}

TEST(lines_below_the_level_are_not_written)
{
    int fd = log_to_pipe();
    dd_log(DD_LOG_DEBUG, "hidden");
    dd_log_set_level(DD_LOG_DEBUG);
    dd_log(DD_LOG_DEBUG, "shown");
    dd_log_set_level(DD_LOG_ERROR);
    dd_log(DD_LOG_WARNING, "hidden");
    read_all(fd);
    CHECK(strstr(got, "hidden") == NULL && strstr(got, "debug shown\n") != NULL);
}

TEST(one_call_is_one_line_whatever_the_bytes)
{
    int fd = log_to_pipe();
    dd_log(
        DD_LOG_INFO, "%s",
        "a\nb\rc\x1b[31m \x7f\xc2\x85 \xff \xe2\x82 \xed\xa0\x80 \xc0\xaf ok: \xc3\xa9\xe2\x82\xac"
        "\xf0\x9f\x98\x80");
    read_all(fd);
    CHECK(strchr(got, '\n') == got + strlen(got) - 1);
    CHECK(strstr(got, "a\\x0ab\\x0dc\\x1b[31m \\x7f\\xc2\\x85 \\xff \\xe2\\x82 \\xed\\xa0\\x80 "
                      "\\xc0\\xaf ok: \xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\n") != NULL);
}

TEST(long_line_is_cut_between_characters)
{
    int fd = log_to_pipe();
    char text[9000];
    for (size_t i = 0; i + 2 < sizeof text; i += 2)
        memcpy(text + i, "\xc3\xa9", 2);
    text[sizeof text - 2] = 0;
    dd_log(DD_LOG_INFO, "%s", text);
    memset(text, 1, sizeof text - 1); /* each becomes four bytes */
    dd_log(DD_LOG_INFO, "%s", text);
    read_all(fd);
    char *end = strchr(got, '\n');
    REQUIRE(end != NULL);
    CHECK(end - got < 2048 && end - got > 2000);
    char *second = end + 1;
    CHECK(strlen(second) <= 2048 && strlen(second) > 2000);
    CHECK(strstr(second, "\\x01...\n") != NULL);
}

TEST(journal_gets_the_priority)
{
    int fds[2];
    struct stat st;
    char stream[64];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    REQUIRE(dup2(fds[1], STDERR_FILENO) >= 0 && fstat(STDERR_FILENO, &st) == 0);
    (void)snprintf(stream, sizeof stream, "%llu:%llu", (unsigned long long)st.st_dev,
                   (unsigned long long)st.st_ino);
    (void)setenv("JOURNAL_STREAM", stream, 1);
    dd_log_init(DD_LOG_INFO);
    dd_log(DD_LOG_NOTICE, "hello");
    read_all(fds[0]);
    CHECK_STR(got, "<5>hello\n");
    /* a name left over from the parent's stderr is not ours */
    (void)setenv("JOURNAL_STREAM", "1:2", 1);
    dd_log_init(DD_LOG_INFO);
    dd_log(DD_LOG_NOTICE, "hello");
    read_all(fds[0]);
    CHECK(strstr(got, "Z notice hello\n") != NULL);
}

/* A reader that stands still must not stop the daemon, and what it missed is told. */
static void reader_stands_still(int fd)
{
    alarm(20);
    for (int i = 0; i < 20000; i++)
        dd_log(DD_LOG_INFO, "line %d of many, long enough to fill what the kernel keeps", i);
    read_all(fd);
    CHECK(strstr(got, "line 0 of") != NULL && strstr(got, "line 19999 of") == NULL);
    dd_log(DD_LOG_INFO, "after");
    read_all(fd);
    CHECK(strstr(got, "lines of this log were lost\n") != NULL);
    CHECK(strstr(got, "info after\n") != NULL);
}

TEST(full_pipe_loses_lines_and_says_so)
{
    reader_stands_still(log_to_pipe());
}

TEST(full_socket_loses_lines_and_says_so)
{
    int fds[2], size = 32768;
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    REQUIRE(setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof size) == 0);
    REQUIRE(dup2(fds[1], STDERR_FILENO) >= 0);
    dd_log_init(DD_LOG_INFO);
    reader_stands_still(fds[0]);
}

TEST(limited_lines_are_counted)
{
    int fd = log_to_pipe();
    dd_log_limit limit = { 0 };
    for (int i = 0; i < 100; i++)
        dd_log_limited(&limit, 3, DD_LOG_INFO, "flood %d", i);
    read_all(fd);
    CHECK(strstr(got, "flood 2") != NULL && strstr(got, "flood 3") == NULL);
    limit.window_ns -= 1100000000; /* a second later */
    dd_log_limited(&limit, 3, DD_LOG_INFO, "flood again");
    read_all(fd);
    CHECK(strstr(got, "97 more lines") != NULL && strstr(got, "flood again") != NULL);
}
