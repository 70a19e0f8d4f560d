/* peer.c -- see peer.h. */
#include "daemon/peer.h"

#include <string.h>
#include <unistd.h>

static bool is_root(const dd_peer *p)
{
    return p->is_unix && (p->uid == 0 || p->uid == (uint32_t)geteuid());
}

bool dd_peer_is_admin(const dd_peer *p)
{
    return is_root(p) || (p->is_unix && p->in_admin_group);
}

bool dd_peer_is_same_user(const dd_peer *a, const dd_peer *b)
{
    if (a->is_unix || b->is_unix)
        return a->is_unix && b->is_unix && a->uid == b->uid;
    return memcmp(a->address, b->address, sizeof a->address) == 0;
}

uint64_t dd_peer_key(const dd_peer *p)
{
    if (p->is_unix)
        return (uint64_t)p->uid + 1;
    uint64_t h =
        UINT64_C(0xcbf29ce484222325); /* FNV-1a: who shares a key shares a limit, no more */
    for (size_t i = 0; i < sizeof p->address; i++)
        h = (h ^ p->address[i]) * UINT64_C(0x100000001b3);
    return h | UINT64_C(1) << 63;
}

bool dd_peer_is_same_client(const dd_peer *a, const dd_peer *b)
{
    if (a->is_unix || b->is_unix)
        return dd_peer_is_same_user(a, b);
    return a->connection == b->connection;
}

bool dd_peer_may_use(const dd_peer *p, const dd_peer *owner)
{
    return is_root(p) || (p->is_unix ? dd_peer_is_same_user(p, owner) : !owner->is_unix);
}

bool dd_peer_may_end(const dd_peer *p, const dd_peer *owner)
{
    return dd_peer_is_admin(p) || dd_peer_may_use(p, owner);
}
