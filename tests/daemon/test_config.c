/* test_config.c -- the settings: file, flags, ranges, printing. */
#include "daemon/config.h"
#include "support/tap.h"

#include <fcntl.h>
#include <sys/stat.h>

/* Parses text as "f.conf" on top of the defaults. */
static int parse(const char *text, dd_config *c, delta_error *err)
{
    dd_config_defaults(c);
    return dd_config_parse(text, strlen(text), "f.conf", c, err);
}

/* text is refused with a message that holds `part`. */
static void refused(const char *text, const char *part)
{
    dd_config c;
    delta_error err = { 0 };
    int r = parse(text, &c, &err);
    if (r >= 0 || !strstr(err.text, part))
        TAP_FAIL("\"%s\": result %d, \"%s\", expected \"%s\"", text, r, err.text, part);
    dd_config_done(&c);
}

TEST(defaults_are_valid_and_print_as_a_file_that_reads_the_same)
{
    dd_config a, b;
    delta_error err = { 0 };
    dd_config_defaults(&a);
    CHECK_EQ(dd_config_check(&a, &err), 0);
    char *text = dd_config_print(&a);
    REQUIRE(text != NULL);
    CHECK_EQ(parse(text, &b, &err), 0);
    char *again = dd_config_print(&b);
    CHECK_STR(again, text);
    free(text);
    free(again);
    dd_config_done(&a);
    dd_config_done(&b);
}

TEST(every_kind_of_value_is_read)
{
    dd_config c;
    delta_error err = { 0 };
    int r = parse("# comment\n"
                  "[model]\n"
                  "path=/models/a b\n"
                  "  backend = cpu   ; indented, with a comment\n"
                  "kv_tokens = 4294967296\n"
                  "\r\n"
                  "[server] ; comment\r\n"
                  "listen =\n"
                  "socket_mode = 0600\r\n"
                  "max_message_bytes = 4M\n"
                  "allow_remote = yes\n"
                  "[limits]\n"
                  "stall_limit = 1500ms\n"
                  "drain_limit = 0\n"
                  "session_idle = 2h\n"
                  "[log]\n"
                  "level = debug", /* no newline at the end */
                  &c, &err);
    CHECK_STR(err.text, "");
    REQUIRE(r == 0);
    CHECK_STR(c.model.path, "/models/a b");
    CHECK_STR(c.model.backend, "cpu");
    CHECK_EQ(c.model.kv_tokens, 4294967296);
    CHECK_STR(c.server.listen, "");
    CHECK_EQ(c.server.socket_mode, 0600);
    CHECK_EQ(c.server.max_message_bytes, 4 << 20);
    CHECK(c.server.allow_remote);
    CHECK_EQ(c.limits.stall_limit_ns, 1500000000);
    CHECK_EQ(c.limits.drain_limit_ns, 0);
    CHECK_EQ(c.limits.session_idle_ns, 7200000000000);
    CHECK_STR(c.log.level, "debug");
    dd_config_done(&c);
}

TEST(errors_name_file_and_line)
{
    refused("[model]\n\n# x\nthreads = many\n", "f.conf:4: model.threads: \"many\"");
    refused("[model]\n[sever]\n", "f.conf:2: unknown section [sever]");
    refused("[model]\nthread = 1\n", "f.conf:2: unknown key \"thread\" in [model]");
    refused("[model]\nthreads = 1\n[log]\n[model]\nthreads = 1\n",
            "f.conf:5: model.threads is set a second time");
    refused("threads = 1\n", "f.conf:1: \"threads\" stands before the first [section]");
    refused("[model]\nthreads\n", "f.conf:2: neither");
    refused("[model]\nthreads: 1\n", "f.conf:2: neither");
    refused("[model\n", "f.conf:1: \"]\" is missing");
    refused("[model] threads = 1\n", "f.conf:1: text behind the section");
}

TEST(values_outside_of_their_range_are_refused)
{
    static const char *const bad[] = {
        "[model]\nthreads = -1",
        "[model]\nthreads = +1",
        "[model]\nthreads = 1025",
        "[model]\nthreads = 0x10",
        "[model]\nthreads = 99999999999999999999999",
        "[model]\nmax_sessions = 0",
        "[model]\nctx_max = 63",
        "[model]\nstep_tokens = 16385",
        "[model]\nbackend = CPU",
        "[model]\nbackend = cpu cuda",
        "[model]\nbackend =",
        "[server]\nsocket_mode = 0999",
        "[server]\nsocket_mode = 01777",
        "[server]\nmax_message_bytes = 65M",
        "[server]\nmax_message_bytes = 20000000000G",
        "[server]\nmax_message_bytes = 1 M",
        "[server]\nallow_remote = maybe",
        "[limits]\nstall_limit = 0",
        "[limits]\nstall_limit = 10 s",
        "[limits]\nstall_limit = 5d",
        "[limits]\nstall_limit = s",
        "[limits]\ndrain_limit = 61min",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        refused(bad[i], "f.conf:2: ");
    refused("[model]\npath =\n", "model.path has 0 bytes");
    refused("[server]\nsocket = /tmp/\ta\n", "no control characters");
}

TEST(hostile_files_are_refused)
{
    dd_config c;
    delta_error err;
    char *big = malloc(300 * 1024);
    REQUIRE(big != NULL);
    memset(big, '\n', 300 * 1024);
    dd_config_defaults(&c);
    CHECK_EQ(dd_config_parse(big, 300 * 1024, "f.conf", &c, &err), DELTA_ELIMIT);
    CHECK_EQ(dd_config_parse(big, 200 * 1024, "f.conf", &c, &err), 0);
    memset(big, 'x', 2000);
    CHECK_EQ(dd_config_parse(big, 2000, "f.conf", &c, &err), DELTA_EFORMAT);
    CHECK(strstr(err.text, "longer than 1021 bytes") != NULL);
    big[0] = '#';
    CHECK_EQ(dd_config_parse(big, 2000, "f.conf", &c, &err), 0); /* a long comment is none */
    CHECK_EQ(dd_config_parse("[log]\nlevel\0=info\n", 18, "f.conf", &c, &err), DELTA_EFORMAT);
    CHECK(strstr(err.text, "NUL") != NULL);
    dd_config_done(&c);
    free(big);
}

TEST(longest_path_of_a_model_is_read)
{
    char text[1100] = "[model]\npath = /", path[1001];
    dd_config c;
    delta_error err;
    memset(path, 'a', 999);
    path[999] = 0;
    strcat(text, path);
    REQUIRE(parse(text, &c, &err) == 0);
    CHECK_EQ(strlen(c.model.path), 1000);
    dd_config_done(&c);
}

/* What single keys cannot tell. */
TEST(combinations_are_checked)
{
    static const struct {
        const char *text, *part; /* NULL: right */
    } cases[] = {
        { "[server]\nsocket=\nttrpc_socket=\n", "nobody could connect" },
        { "[server]\nsocket=a.sock\n", "\"a.sock\" is not an absolute path" },
        { "[server]\nsocket=/x\nttrpc_socket=/x\n", "are both" },
        { "[server]\nlisten=0.0.0.0:1\n", "not loopback" },
        { "[server]\nlisten=127.0.0.1.evil.example:1\n", "not loopback" },
        { "[server]\nlisten=[::]:1\n", "not loopback" },
        { "[server]\nlisten=[::]:1\nallow_remote=yes\n", NULL },
        { "[server]\nlisten=127.0.0.1:65536\n", "not HOST:PORT" },
        { "[server]\nlisten=::1:80\n", "not HOST:PORT" },
        { "[server]\nlisten=:80\n", "not HOST:PORT" },
        { "[server]\nlisten=80\n", "not HOST:PORT" },
        { "[server]\nlisten=[::1]:80\n", NULL },
        { "[server]\nlisten=localhost:0\n", NULL },
        { "[server]\nsocket_group=no-such-group-here\n", "there is no group" },
        { "[policy]\nadmin_group=root\n", NULL },
        { "[model]\nctx_max=4096\nkv_tokens=2048\n", "holds no sequence" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dd_config c;
        delta_error err = { 0 };
        CHECK_EQ(parse(cases[i].text, &c, &err), 0);
        int r = dd_config_check(&c, &err);
        if (cases[i].part ? r >= 0 || !strstr(err.text, cases[i].part) : r < 0)
            TAP_FAIL("%s: %d %s", cases[i].text, r, err.text);
        dd_config_done(&c);
    }
}

/* ---- flags ---- */

static int load(char **argv, dd_config *c, enum dd_action *a, delta_error *err)
{
    int argc = 0;
    while (argv[argc])
        argc++;
    return dd_config_load(argc, argv, c, a, err);
}
#define ARGV(...) ((char *[]){ (char[]){ "deltad" }, __VA_ARGS__, NULL })

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0)
        TAP_FAIL("cannot write %s", path);
}

TEST(flags_win_over_the_file_in_both_forms)
{
    char folder[] = "/tmp/test_config.XXXXXX", path[64];
    dd_config c;
    enum dd_action a;
    delta_error err = { 0 };
    REQUIRE(mkdtemp(folder) != NULL);
    (void)snprintf(path, sizeof path, "%s/x.conf", folder);
    write_file(path, "[model]\npath = /from/file\nbackend = cuda\n[server]\nsocket = /f.sock\n");
    REQUIRE(load(ARGV("--config", path, "--model=/from/flag", "--backend", "cpu",
                      "--listen=localhost:1"),
                 &c, &a, &err) == 0);
    CHECK_EQ(a, DD_RUN);
    CHECK_STR(c.model.path, "/from/flag");
    CHECK_STR(c.model.backend, "cpu");
    CHECK_STR(c.server.socket, "/f.sock");
    CHECK_STR(c.server.listen, "localhost:1");
    dd_config_done(&c);
    write_file(path, "[model]\nnonsense = 1\n");
    CHECK_EQ(load(ARGV("--config", path), &c, &a, &err), DELTA_EFORMAT);
    CHECK(strncmp(err.text, path, strlen(path)) == 0 && strstr(err.text, ":2: unknown key"));
    CHECK_EQ(load(ARGV("--config", path, "--help"), &c, &a, &err), 0); /* the file is not read */
    CHECK_EQ(a, DD_PRINT_HELP);
    dd_config_done(&c);
    (void)unlink(path);
    CHECK_EQ(load(ARGV("--config", path), &c, &a, &err), DELTA_ENOTFOUND);
    (void)rmdir(folder);
}

TEST(wrong_arguments_are_usage_errors)
{
    static char *const bad[][3] = {
        { "--modle=/x" },
        { "--model" },
        { "model" },
        { "--help=yes" },
        { "--mode", "/x" },
        { "-x" },
        { "--backend=tpu" },
        { "--model=" },
        { "--model=/a", "--model=/b" },
        { "-hV" },
        { "--socket=/a\nb" },
        { "" },
        { "--config=/dev/null", "--listen" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char *argv[] = { (char[]){ "deltad" }, bad[i][0], bad[i][1], bad[i][2], NULL };
        dd_config c;
        enum dd_action a;
        delta_error err = { 0 };
        CHECK_EQ(load(argv, &c, &a, &err), DELTA_EINVALID);
        CHECK_EQ(err.code, DELTA_EINVALID);
        CHECK(err.text[0] != 0);
    }
}

TEST(help_names_every_flag_and_version_has_a_letter)
{
    dd_config c;
    enum dd_action a;
    delta_error err;
    char *help = dd_config_help();
    REQUIRE(help != NULL);
    static const char *const names[] = { "--config",       "--model",        "--socket",
                                         "--ttrpc-socket", "--listen",       "--backend",
                                         "--check-config", "--print-config", "-V, --version",
                                         "-h, --help" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        CHECK(strstr(help, names[i]) != NULL);
    free(help);
    REQUIRE(load(ARGV("-V"), &c, &a, &err) == 0);
    CHECK_EQ(a, DD_PRINT_VERSION);
    dd_config_done(&c);
}

TEST(sockets_lie_in_the_runtime_folder)
{
    dd_config c;
    (void)setenv("RUNTIME_DIRECTORY", "/run/one:/run/two", 1);
    dd_config_defaults(&c);
    CHECK_STR(c.server.socket, "/run/one/deltad.sock");
    CHECK_STR(c.server.ttrpc_socket, "/run/one/deltad-ttrpc.sock");
    dd_config_done(&c);
    (void)unsetenv("RUNTIME_DIRECTORY");
    (void)setenv("XDG_RUNTIME_DIR", "/run/user/7", 1);
    dd_config_defaults(&c);
    CHECK_STR(c.server.socket,
              geteuid() == 0 ? "/run/deltad/deltad.sock" : "/run/user/7/deltad/deltad.sock");
    dd_config_done(&c);
}

TEST(the_model_of_a_build_tree_is_the_one_of_its_source)
{
    dd_config c;
    dd_config_defaults(&c);
    CHECK_STR(c.model.path, DEMO_MODEL_DIR);
    dd_config_done(&c);
}

TEST(socket_named_by_a_flag_may_be_relative_and_is_kept_absolute)
{
    dd_config c;
    enum dd_action a;
    delta_error err;
    char cwd[80], wanted[120], far[200] = "";
    REQUIRE(chdir("/tmp") == 0 && getcwd(cwd, sizeof cwd));
    char **argv = ARGV("--config=/dev/null", "--socket", "./x/a.sock", "--ttrpc-socket=b.sock");
    CHECK_EQ(load(argv, &c, &a, &err), 0);
    (void)snprintf(wanted, sizeof wanted, "%s/x/a.sock", cwd);
    CHECK_STR(c.server.socket, wanted);
    (void)snprintf(wanted, sizeof wanted, "%s/b.sock", cwd);
    CHECK_STR(c.server.ttrpc_socket, wanted);
    dd_config_done(&c);
    argv = ARGV("--config=/dev/null", "--socket=", "--ttrpc-socket=/run/b.sock");
    CHECK_EQ(load(argv, &c, &a, &err), 0);
    CHECK_STR(c.server.socket, "");
    CHECK_STR(c.server.ttrpc_socket, "/run/b.sock");
    dd_config_done(&c);
    memset(far, 'f', 150);
    argv = ARGV("--config=/dev/null", "--socket", far);
    CHECK_EQ(load(argv, &c, &a, &err), DELTA_EINVALID);
    CHECK(strstr(err.text, "--socket: server.socket has "));
}
