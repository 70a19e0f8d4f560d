/* main.c -- deltad: arguments -> configuration -> loop -> exit status. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/config.h"
#include "daemon/log.h"
#include "daemon/loop.h"
#include "delta/delta.h"

/* Prints a malloc'ed text; NULL: memory ran out. */
static int print(char *text)
{
    int status =
        text && fputs(text, stdout) >= 0 && fflush(stdout) == 0 ? DD_EXIT_OK : DD_EXIT_INTERNAL;
    free(text);
    return status;
}

int main(int argc, char **argv)
{
    dd_config c;
    enum dd_action action;
    delta_error err;
    int status = DD_EXIT_OK;

    dd_log_init(DD_LOG_INFO);
    (void)signal(SIGPIPE, SIG_IGN); /* a peer that went away is an error code, not an end */
    (void)signal(SIGXFSZ, SIG_IGN); /* so is a limit of the size of files */
    if (dd_config_load(argc, argv, &c, &action, &err) < 0) {
        dd_log(DD_LOG_ERROR, "%s", err.text);
        return err.code == DELTA_EINVALID ? DD_EXIT_USAGE : DD_EXIT_CONFIG;
    }
    switch (action) {
    case DD_RUN:
        dd_log_set_level(dd_loop_log_level(&c));
        return dd_loop_run(&c, argc, argv);
    case DD_CHECK_CONFIG:
        status = printf("the configuration is correct\n") > 0 ? DD_EXIT_OK : DD_EXIT_INTERNAL;
        break;
    case DD_PRINT_CONFIG:
        status = print(dd_config_print(&c));
        break;
    case DD_PRINT_VERSION:
        status = printf("deltad %s\n", DELTA_VERSION) > 0 ? DD_EXIT_OK : DD_EXIT_INTERNAL;
        break;
    case DD_PRINT_HELP:
        status = print(dd_config_help());
        break;
    }
    dd_config_done(&c);
    return status;
}
