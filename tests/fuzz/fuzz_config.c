/* fuzz_config.c -- the configuration parser: any bytes; what it takes must print and read back. */
#include <stdlib.h>
#include <string.h>

#include "daemon/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    dd_config a, b;
    delta_error err = { 0 };
    dd_config_defaults(&a);
    if (dd_config_parse((const char *)data, size, "fuzz", &a, &err) < 0) {
        if (!err.text[0])
            abort(); /* an error without a text */
    } else {
        dd_config_defaults(&b);
        char *once = dd_config_print(&a);
        if (!once || dd_config_parse(once, strlen(once), "printed", &b, &err) < 0)
            abort();
        char *twice = dd_config_print(&b);
        if (!twice || strcmp(once, twice) != 0)
            abort();
        free(once);
        free(twice);
        dd_config_done(&b);
    }
    dd_config_done(&a);
    return 0;
}
