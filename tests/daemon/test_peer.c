/* test_peer.c -- who may touch what, and who counts as one. */
#include <unistd.h>

#include "daemon/peer.h"
#include "support/tap.h"

static const dd_peer alice = { .connection = 1, .is_unix = true, .uid = 54321 };
static const dd_peer alice_again = { .connection = 2, .is_unix = true, .uid = 54321 };
static const dd_peer bob = { .connection = 3, .is_unix = true, .uid = 54322 };
static const dd_peer admin = {
    .connection = 4, .is_unix = true, .uid = 54323, .in_admin_group = true
};
static const dd_peer root = { .connection = 5, .is_unix = true };
static const dd_peer tcp = { .connection = 6, .uid = UINT32_MAX, .address = { [15] = 1 } };
static const dd_peer tcp_again = { .connection = 7, .uid = UINT32_MAX, .address = { [15] = 1 } };
static const dd_peer tcp_far = { .connection = 8, .uid = UINT32_MAX, .address = { 0xfd } };

TEST(user_of_a_unix_socket_is_the_same_on_all_connections)
{
    CHECK(dd_peer_is_same_user(&alice, &alice_again) &&
          dd_peer_is_same_client(&alice, &alice_again));
    CHECK(dd_peer_may_use(&alice_again, &alice) && dd_peer_may_end(&alice_again, &alice));
    CHECK(!dd_peer_is_same_user(&alice, &bob) && !dd_peer_is_same_client(&alice, &bob));
    CHECK(!dd_peer_may_use(&bob, &alice) && !dd_peer_may_end(&bob, &alice));
}

TEST(admins_see_and_end_and_root_may_use_too)
{
    dd_peer own = { .is_unix = true, .uid = (uint32_t)geteuid() };
    CHECK(dd_peer_is_admin(&admin) && dd_peer_is_admin(&root) && dd_peer_is_admin(&own));
    CHECK(!dd_peer_is_admin(&alice) && !dd_peer_is_admin(&tcp));
    CHECK(dd_peer_may_end(&admin, &alice) && !dd_peer_may_use(&admin, &alice));
    CHECK(dd_peer_may_end(&admin, &tcp) && !dd_peer_may_use(&admin, &tcp));
    CHECK(dd_peer_may_end(&root, &alice) && dd_peer_may_use(&root, &alice));
    CHECK(dd_peer_may_use(&root, &tcp));
}

TEST(peers_of_tcp_share_what_they_hold_the_id_of_and_nothing_else)
{
    CHECK(dd_peer_may_use(&tcp_again, &tcp) && dd_peer_may_end(&tcp_far, &tcp));
    CHECK(dd_peer_is_same_user(&tcp, &tcp_again) && !dd_peer_is_same_user(&tcp, &tcp_far));
    CHECK(dd_peer_is_same_client(&tcp, &tcp) && !dd_peer_is_same_client(&tcp, &tcp_again));
}

TEST(tcp_and_unix_never_meet)
{
    dd_peer fool = tcp; /* uid 0 must mean nothing here */
    fool.uid = 0;
    fool.in_admin_group = true;
    CHECK(!dd_peer_is_admin(&fool));
    CHECK(!dd_peer_may_use(&fool, &alice) && !dd_peer_may_end(&fool, &root));
    CHECK(!dd_peer_may_use(&alice, &tcp) && !dd_peer_may_end(&alice, &tcp));
    CHECK(!dd_peer_is_same_user(&fool, &root) && !dd_peer_is_same_client(&root, &fool));
}
