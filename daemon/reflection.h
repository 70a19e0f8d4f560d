/* reflection.h -- grpc.reflection.v1 and v1alpha over the descriptor set that is built in.
 *
 * A handler of bidi calls: the table of methods forwards start, message, half-close, sent and
 * close of these two methods to the functions below. It answers list_services, file_by_filename
 * and file_containing_symbol (the file and all it imports, imports first); what it does not
 * have is answered by an error message inside the stream, as the protocol wants it.
 *
 * Flow       transports deliver the next message of a bidi call only after the answer to the
 *            last one was taken, so one answer is all that is ever held.
 * Threads    loop thread only. */
#ifndef DD_REFLECTION_H
#define DD_REFLECTION_H

#include "daemon/rpc.h"

/* The answer to one request: malloc'ed; NULL when memory ran out or the request is malformed
 * (then *ret_malformed). Pure: for tests and fuzzing. */
uint8_t *dd_reflection_answer(const uint8_t *msg, size_t len, size_t *ret_len, bool *ret_malformed);

void dd_reflection_message(dd_rpc *r, const uint8_t *msg, size_t len);
void dd_reflection_half_closed(dd_rpc *r);
void dd_reflection_sent(dd_rpc *r);
void dd_reflection_closed(dd_rpc *r);

#endif
