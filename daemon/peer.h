/* peer.h -- who a peer is: whose requests and sessions are whose, and who may touch them.
 *
 * On a Unix socket the kernel says who calls: the user owns what he makes, on all his connections.
 * On TCP nobody is known. There a request or session belongs to who holds its id, which nobody can
 * guess if the daemon made it; what a client named itself (a request's id) belongs to its
 * connection. Limits count the address: all of loopback is one user, an IPv6 network of 64 bits
 * another, and one connection has a limit of its own so that it cannot take the others' share.
 *
 * Nobody on TCP touches what was made on a Unix socket. Admins are root, the daemon's own user and
 * the members of policy.admin_group, on Unix sockets alone.
 *
 * Threads    pure functions: any thread. */
#ifndef DD_PEER_H
#define DD_PEER_H

#include "daemon/rpc.h"

bool dd_peer_is_admin(const dd_peer *p);
/* Whether both count as one user for limits. */
bool dd_peer_is_same_user(const dd_peer *a, const dd_peer *b);
/* A number for that user, never 0. */
uint64_t dd_peer_key(const dd_peer *p);
/* Whether both see the same lists and the same names given by clients. */
bool dd_peer_is_same_client(const dd_peer *a, const dd_peer *b);
/* Whether p, who named the daemon's own id of it, may go on with what owner made. */
bool dd_peer_may_use(const dd_peer *p, const dd_peer *owner);
/* Whether p may see and end it. */
bool dd_peer_may_end(const dd_peer *p, const dd_peer *owner);

#endif
