/* loop.h -- the daemon's event loop: the order of start, drain and stop, and the signals. */
#ifndef DD_LOOP_H
#define DD_LOOP_H

#include "daemon/config.h"

/* What the process says when it ends; also in deltad(8) and in the unit file. */
enum dd_exit {
    DD_EXIT_OK = 0,
    DD_EXIT_USAGE = 64,    /* EX_USAGE: wrong arguments */
    DD_EXIT_INTERNAL = 70, /* EX_SOFTWARE: a fault of the device or of deltad; a restart may help */
    DD_EXIT_CONFIG = 78,   /* EX_CONFIG: settings, sockets or model; a restart does not help */
};

/* Runs until a signal or a fault. argc, argv: of the program, for SIGHUP. Takes over *c. */
int dd_loop_run(dd_config *c, int argc, char **argv);
/* The log's level as the configuration has it. */
int dd_loop_log_level(const dd_config *c);

#endif
