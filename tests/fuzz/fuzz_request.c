/* fuzz_request.c -- request messages of every kind: any bytes are decoded or refused with a reason,
 * within the memory that wire.h promises. The first byte chooses the kind. */
#include <stdlib.h>
#include <string.h>

#include "daemon/codec.h"
#include "daemon/limits.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    dd_request r;
    dd_status st = { 0 };
    if (size == 0)
        return 0;
    enum dd_request_kind kind = (enum dd_request_kind)(data[0] % (DD_REQ_STATS + 1));
    if (dd_request_decode(kind, data + 1, size - 1, &r, &st) < 0) {
        if (st.code == DD_OK || !st.reason || !st.message[0])
            abort(); /* a refusal without a reason */
    } else if (r.n_messages > DD_SESSION_MESSAGES || r.sampling.n_bias > DELTA_MAX_LOGIT_BIAS ||
               r.stopping.n_strings > DELTA_MAX_STOP_STRINGS) {
        abort(); /* past a limit */
    }
    if (r.arena.used > r.arena.limit)
        abort();
    dd_request_done(&r);
    return 0;
}
