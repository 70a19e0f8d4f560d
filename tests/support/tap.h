/* tap.h -- the test runner: TEST() registers, every test runs in a child of its own.
 *
 *   TEST(unit_behaviour_when_condition) { CHECK_EQ(f(1), 2); }
 *
 * A program of tests is one .c file that includes this header once; main() is
 * here. Output is TAP. A crash or a hang (60 s) of one test fails that test
 * alone. Arguments: names of tests to run, in this process (for a debugger). */
#ifndef TAP_H
#define TAP_H

#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct tap_test tap_test;
struct tap_test {
    const char *name;
    void (*run)(void);
    tap_test *next;
};
static tap_test *tap_first, **tap_last = &tap_first;
static unsigned tap_timeout_s = 60; /* of one test; a file may set it in a constructor */

#define TEST(name_)                                                                                \
    static void name_(void);                                                                       \
    static tap_test tap_##name_ = { #name_, name_, NULL };                                         \
    __attribute__((constructor)) static void tap_register_##name_(void)                            \
    {                                                                                              \
        *tap_last = &tap_##name_;                                                                  \
        tap_last = &tap_##name_.next;                                                              \
    }                                                                                              \
    static void name_(void)

static int tap_failed;
#define TAP_FAIL(...)                                                                              \
    do {                                                                                           \
        printf("# %s:%d: ", __FILE__, __LINE__);                                                   \
        printf(__VA_ARGS__);                                                                       \
        printf("\n");                                                                              \
        if (++tap_failed >= 20) {                                                                  \
            printf("# too many failures, giving up on this test\n");                               \
            fflush(stdout);                                                                        \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

/* All checks go on after a failure; REQUIRE ends the test. */
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond))                                                                               \
            TAP_FAIL("failed: %s", #cond);                                                         \
    } while (0)
#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            TAP_FAIL("failed: %s", #cond);                                                         \
            return;                                                                                \
        }                                                                                          \
    } while (0)
#define CHECK_EQ(a, b)                                                                             \
    do {                                                                                           \
        long long tap_a = (long long)(a), tap_b = (long long)(b);                                  \
        if (tap_a != tap_b)                                                                        \
            TAP_FAIL("%s is %lld, expected %s = %lld", #a, tap_a, #b, tap_b);                      \
    } while (0)
#define CHECK_NEAR(a, b, tol)                                                                      \
    do {                                                                                           \
        double tap_a = (a), tap_b = (b);                                                           \
        if (!(fabs(tap_a - tap_b) <= (tol)))                                                       \
            TAP_FAIL("%s is %.9g, expected %.9g +- %g", #a, tap_a, tap_b, (double)(tol));          \
    } while (0)
#define CHECK_STR(a, b)                                                                            \
    do {                                                                                           \
        const char *tap_a = (a), *tap_b = (b);                                                     \
        if (!tap_a || !tap_b || strcmp(tap_a, tap_b) != 0)                                         \
            TAP_FAIL("%s is \"%s\", expected \"%s\"", #a, tap_a ? tap_a : "(null)",                \
                     tap_b ? tap_b : "(null)");                                                    \
    } while (0)
#define CHECK_MEM(a, a_len, b, b_len)                                                              \
    do {                                                                                           \
        size_t tap_al = (a_len), tap_bl = (b_len);                                                 \
        const char *tap_a = (const char *)(a), *tap_b = (const char *)(b);                         \
        if (tap_al != tap_bl || (tap_al && memcmp(tap_a, tap_b, tap_al) != 0))                     \
            TAP_FAIL("%s is \"%.*s\" (%zu), expected \"%.*s\" (%zu)", #a, (int)tap_al,             \
                     tap_a ? tap_a : "", tap_al, (int)tap_bl, tap_b ? tap_b : "", tap_bl);         \
    } while (0)
/* Says why a test was not run; counts as passed but is visible. */
#define SKIP(why)                                                                                  \
    do {                                                                                           \
        printf("# SKIP %s\n", why);                                                                \
        return;                                                                                    \
    } while (0)

static int tap_run_one(const tap_test *t, bool fork_it)
{
    fflush(stdout);
    if (!fork_it) {
        tap_failed = 0;
        t->run();
        return tap_failed != 0;
    }
    pid_t pid = fork();
    if (pid < 0)
        return 1;
    if (pid == 0) {
        alarm(tap_timeout_s);
        t->run();
        fflush(stdout);
        /* exit, not _exit: leak checkers report at exit */
        exit(tap_failed ? 1 : 0);
    }
    int status;
    if (waitpid(pid, &status, 0) != pid)
        return 1;
    if (WIFSIGNALED(status))
        printf("# ended by signal %d%s\n", WTERMSIG(status),
               WTERMSIG(status) == SIGALRM ? " (too slow)" : "");
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

int main(int argc, char **argv)
{
    int n = 0, failed = 0;
    for (const tap_test *t = tap_first; t; t = t->next) {
        bool wanted = argc < 2;
        for (int i = 1; i < argc; i++)
            wanted |= strcmp(argv[i], t->name) == 0;
        if (!wanted)
            continue;
        int bad = tap_run_one(t, argc < 2);
        printf("%sok %d %s\n", bad ? "not " : "", ++n, t->name);
        failed += bad;
    }
    printf("1..%d\n", n);
    return n == 0 || failed ? 1 : 0;
}

#endif
