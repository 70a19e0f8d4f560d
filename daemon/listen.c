/* listen.c -- see listen.h.
 *
 * A gRPC connection belongs to the core, which closes its descriptor without a word. Each one is
 * given a fresh, rising descriptor number when it is accepted, so that the "fd:N" by which the
 * core names the peer of a call means one connection for a long time, and once a second it is
 * looked whether number N is still the same socket.
 *
 * Two instances that start at once are kept apart by a lock file beside the socket; one that is
 * not deltad, or of another user, by trying to connect. Only a socket that nobody answers is
 * replaced. What was inherited is neither checked so nor ever removed.
 *
 * The Unix socket of gRPC takes ttrpc too, so that a tool need not know which of the two paths it
 * was given: what a peer sends first tells. A frame of ttrpc begins with the high byte of a length
 * under 4 MiB, which is 0, HTTP/2 with "PRI". Until then the connection waits here.
 *
 * When descriptors run out, or as many connections are open as may be, accepting pauses: peers
 * wait in the backlog, and nothing spins. What one user has too many of is closed at once, so that
 * the others need not wait for him. */
#include "daemon/listen.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "daemon/grpc/server.h"
#include "daemon/log.h"
#include "daemon/peer.h"
#include "daemon/ttrpc/server.h"

enum {
    LISTENERS_MAX = 8,
    BACKLOG = 511,
    ACCEPTS_AT_ONCE = 64, /* of one listener, before others get their turn */
    PAUSE_MS = 100,       /* after an accept that failed for want of something */
    SWEEP_MS = 1000,
    FD_BASE = 64,    /* gRPC's connections are numbered from here ... */
    FD_ROUNDS = 4,   /* ... over so many times max_connections numbers */
    FDS_BESIDE = 64, /* descriptors that connections must leave to the rest of the daemon */
    LOCK_TRIES = 16,
    GROUPS_MAX = 4096, /* who is in more is in no admin group */
};

enum transport { GRPC, TTRPC };

struct listener {
    uv_poll_t poll;
    struct dd_listen *owner;
    int fd;
    enum transport transport;
    bool is_inherited;
    char name[128];
    char path[108]; /* Unix sockets made here: removed at the end if still ours */
    dev_t dev;
    ino_t ino;
    int lock_fd; /* -1: none */
};

struct conn { /* of gRPC; ttrpc keeps its own */
    dd_peer peer;
    ino_t ino;
};

struct user_count {
    dd_peer peer; /* one of the user's */
    uint32_t n;
};

struct pending { /* accepted, and has not said anything yet */
    uv_poll_t poll;
    struct dd_listen *owner;
    int fd;
    dd_peer peer;
    struct pending *prev, *next;
};

struct dd_listen {
    uv_loop_t *loop;
    const dd_config *config;
    dd_service *service;
    dd_grpc_server *grpc;
    dd_ttrpc_server *ttrpc;
    struct listener *listeners[LISTENERS_MAX];
    size_t n_listeners;
    struct pending *pending;
    uv_timer_t pause, sweep;
    uint32_t n_handles;
    struct conn **by_fd; /* [by_fd_size] gRPC's connections */
    int by_fd_size, next_fd;
    struct user_count *users; /* [n_users], room for max_connections */
    size_t n_users;
    bool has_admin_group;
    gid_t admin_group;
    uint32_t n_now, n_max, n_grpc;
    uint64_t n_total;
    dd_log_limit refused, starved;
    uint32_t n_going; /* transports that have not said they are gone */
    void (*on_gone)(void *arg);
    void *on_gone_arg;
};

/* ---- counts ---- */

static struct user_count *count_of(dd_listen *l, const dd_peer *p)
{
    for (size_t i = 0; i < l->n_users; i++)
        if (dd_peer_is_same_user(&l->users[i].peer, p))
            return &l->users[i];
    return NULL;
}

static void count_in(dd_listen *l, const dd_peer *p)
{
    struct user_count *u = count_of(l, p);
    if (!u) {
        u = &l->users[l->n_users++]; /* at most one a connection */
        *u = (struct user_count){ .peer = *p };
    }
    u->n++;
    l->n_now++;
    dd_service_connections(l->service, l->n_now, ++l->n_total);
}

static void count_out(dd_listen *l, const dd_peer *p)
{
    struct user_count *u = count_of(l, p);
    assert(u && u->n && l->n_now);
    if (--u->n == 0)
        *u = l->users[--l->n_users];
    l->n_now--;
    dd_service_connections(l->service, l->n_now, l->n_total);
}

/* ---- gRPC's connections ---- */

static const dd_peer *peer_of(void *arg, int fd)
{
    dd_listen *l = arg;
    return fd >= 0 && fd < l->by_fd_size && l->by_fd[fd] ? &l->by_fd[fd]->peer : NULL;
}

static void forget(dd_listen *l, int fd)
{
    struct conn *c = l->by_fd[fd];
    l->by_fd[fd] = NULL;
    l->n_grpc--;
    count_out(l, &c->peer);
    free(c);
}

static void sweep(dd_listen *l)
{
    struct stat st;
    uint32_t left = l->n_grpc;
    for (int fd = 0; fd < l->by_fd_size && left; fd++) {
        if (!l->by_fd[fd])
            continue;
        left--;
        if (fstat(fd, &st) < 0 || st.st_ino != l->by_fd[fd]->ino)
            forget(l, fd);
    }
}

static void on_sweep(uv_timer_t *t)
{
    dd_listen *l = t->data;
    sweep(l);
    if (!l->n_grpc)
        (void)uv_timer_stop(t);
}

/* Moves fd to the next free number of the range; -1 and errno if there is none. Closes fd. */
static int renumber(dd_listen *l, int fd)
{
    int to = -1;
    for (int tries = 0; tries < 2 && to < 0; tries++) {
        to = fcntl(fd, F_DUPFD_CLOEXEC, l->next_fd);
        if (to >= l->by_fd_size) {
            (void)close(to);
            to = -1;
            errno = EMFILE;
        }
        if (to < 0)
            l->next_fd = FD_BASE;
    }
    int e = errno;
    (void)close(fd);
    errno = e;
    if (to >= 0)
        l->next_fd = to + 1 < l->by_fd_size ? to + 1 : FD_BASE;
    return to;
}

/* <0 and errno: the connection is closed. */
static int add_grpc(dd_listen *l, int fd, const dd_peer *peer)
{
    struct stat st;
    struct conn *c = calloc(1, sizeof *c);
    fd = renumber(l, fd);
    if (fd < 0 || !c || fstat(fd, &st) < 0) {
        if (fd >= 0)
            (void)close(fd);
        free(c);
        return -1;
    }
    if (l->by_fd[fd])
        forget(l, fd); /* the number is free, so that one has gone */
    *c = (struct conn){ *peer, st.st_ino };
    l->by_fd[fd] = c;
    l->n_grpc++;
    count_in(l, peer);
    if (!uv_is_active((uv_handle_t *)&l->sweep))
        (void)uv_timer_start(&l->sweep, on_sweep, SWEEP_MS, SWEEP_MS);
    dd_grpc_server_add(l->grpc, fd);
    return 0;
}

static void on_ttrpc_closed(void *arg, const dd_peer *peer)
{
    count_out(arg, peer);
}

static int add_ttrpc(dd_listen *l, int fd, const dd_peer *peer)
{
    count_in(l, peer);
    if (dd_ttrpc_server_add(l->ttrpc, fd, peer) == 0)
        return 0;
    count_out(l, peer);
    errno = ENOMEM;
    return -1;
}

/* ---- which of the two ---- */

static void on_handle_closed(uv_handle_t *h);

static void on_pending_closed(uv_handle_t *h)
{
    struct pending *p = (struct pending *)h;
    uv_handle_t owner = { .data = p->owner };
    free(p);
    on_handle_closed(&owner);
}

/* Takes it from the list; its descriptor is the caller's now. */
static int unpend(struct pending *p)
{
    dd_listen *l = p->owner;
    *(p->prev ? &p->prev->next : &l->pending) = p->next;
    if (p->next)
        p->next->prev = p->prev;
    count_out(l, &p->peer);
    (void)uv_poll_stop(&p->poll);
    uv_close((uv_handle_t *)&p->poll, on_pending_closed);
    return p->fd;
}

static void on_first_byte(uv_poll_t *poll, int status, int events)
{
    struct pending *p = (struct pending *)poll;
    dd_listen *l = p->owner;
    uint8_t first;
    (void)events;
    ssize_t n = status < 0 ? 0 : recv(p->fd, &first, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    const dd_peer peer = p->peer;
    const int fd = unpend(p);
    if (n <= 0)
        (void)close(fd); /* it went without a word */
    else if (first == 0)
        (void)add_ttrpc(l, fd, &peer);
    else
        (void)add_grpc(l, fd, &peer);
}

static int pend(dd_listen *l, int fd, const dd_peer *peer)
{
    struct pending *p = calloc(1, sizeof *p);
    if (!p || uv_poll_init(l->loop, &p->poll, fd) < 0) {
        (void)close(fd);
        free(p);
        errno = ENOMEM;
        return -1;
    }
    l->n_handles++;
    p->owner = l;
    p->fd = fd;
    p->peer = *peer;
    p->next = l->pending;
    if (p->next)
        p->next->prev = p;
    l->pending = p;
    count_in(l, peer);
    (void)uv_poll_start(&p->poll, UV_READABLE | UV_DISCONNECT, on_first_byte);
    return 0;
}

/* ---- accept ---- */

static bool is_loopback(const struct sockaddr *a)
{
    if (a->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24 == 127;
    if (a->sa_family != AF_INET6)
        return a->sa_family == AF_UNIX;
    const struct in6_addr *v6 = &((const struct sockaddr_in6 *)a)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(v6) || (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == 127);
}

static void print_address(const struct sockaddr *a, char *to, size_t size)
{
    char host[INET6_ADDRSTRLEN] = "?";
    if (a->sa_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)a;
        (void)inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof host);
        (void)snprintf(to, size, "[%s]:%u", host, ntohs(v6->sin6_port));
    } else {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)a;
        (void)inet_ntop(AF_INET, &v4->sin_addr, host, sizeof host);
        (void)snprintf(to, size, "%s:%u", host, ntohs(v4->sin_port));
    }
}

/* What limits count TCP peers by: IPv4 as it is, of IPv6 the network, all of loopback as one. */
static void take_address(const struct sockaddr *a, uint8_t to[16])
{
    memset(to, 0, 16);
    if (is_loopback(a)) {
        to[15] = 1;
    } else if (a->sa_family == AF_INET) {
        to[10] = to[11] = 0xff;
        memcpy(to + 12, &((const struct sockaddr_in *)a)->sin_addr, 4);
    } else {
        const struct in6_addr *v6 = &((const struct sockaddr_in6 *)a)->sin6_addr;
        memcpy(to, v6, IN6_IS_ADDR_V4MAPPED(v6) ? 16 : 8);
    }
}

/* As the kernel has its groups, not as the system's files have them by now. */
static bool is_in_group(int fd, gid_t primary, gid_t wanted)
{
    gid_t groups[GROUPS_MAX];
    socklen_t n = sizeof groups;
    if (primary == wanted)
        return true;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &n) < 0)
        return false;
    for (size_t i = 0; i < n / sizeof groups[0]; i++)
        if (groups[i] == wanted)
            return true;
    return false;
}

static int identify(dd_listen *l, int fd, const struct sockaddr *a, dd_peer *ret_p)
{
    dd_peer p = { .connection = l->n_total + 1,
                  .is_unix = a->sa_family == AF_UNIX,
                  .is_loopback = is_loopback(a),
                  .uid = UINT32_MAX,
                  .gid = UINT32_MAX };
    if (p.is_unix) {
        struct ucred cred;
        socklen_t n = sizeof cred;
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &n) < 0)
            return -1;
        p.uid = cred.uid;
        p.gid = cred.gid;
        p.pid = cred.pid;
        p.in_admin_group = l->has_admin_group && is_in_group(fd, cred.gid, l->admin_group);
        (void)snprintf(p.text, sizeof p.text, "unix uid %u pid %d", p.uid, p.pid);
    } else {
        int on = 1;
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        take_address(a, p.address);
        print_address(a, p.text, sizeof p.text);
    }
    *ret_p = p;
    return 0;
}

static bool has_too_many(dd_listen *l, const dd_peer *p)
{
    const struct user_count *u = count_of(l, p);
    return u && u->n >= l->config->server.max_connections_per_uid;
}

static int admit(struct listener *k, int fd, const struct sockaddr *a)
{
    dd_listen *l = k->owner;
    dd_peer p;
    if (identify(l, fd, a, &p) < 0) {
        (void)close(fd);
        return 0; /* its fault or bad luck, not ours */
    }
    if (has_too_many(l, &p))
        sweep(l); /* some may have gone since the last look */
    if (has_too_many(l, &p)) {
        dd_log_limited(&l->refused, 2, DD_LOG_WARNING,
                       "%s: refused: too many connections of this user", p.text);
        (void)close(fd);
        return 0;
    }
    if (k->transport == TTRPC)
        return add_ttrpc(l, fd, &p);
    return p.is_unix ? pend(l, fd, &p) : add_grpc(l, fd, &p);
}

static void on_connection(uv_poll_t *poll, int status, int events);

static void poll_all(dd_listen *l)
{
    for (size_t i = 0; i < l->n_listeners; i++)
        (void)uv_poll_start(&l->listeners[i]->poll, UV_READABLE, on_connection);
}

static void on_pause_over(uv_timer_t *t)
{
    poll_all(t->data);
}

static void pause_accepting(dd_listen *l, const char *why)
{
    dd_log_limited(&l->starved, 1, DD_LOG_WARNING, "%s; new connections wait", why);
    for (size_t i = 0; i < l->n_listeners; i++)
        (void)uv_poll_stop(&l->listeners[i]->poll);
    (void)uv_timer_start(&l->pause, on_pause_over, PAUSE_MS, 0);
}

static void on_connection(uv_poll_t *poll, int status, int events)
{
    struct listener *k = poll->data;
    (void)status;
    (void)events;
    for (int i = 0; i < ACCEPTS_AT_ONCE; i++) {
        struct sockaddr_storage a = { 0 };
        socklen_t n = sizeof a;
        if (k->owner->n_now >= k->owner->n_max)
            sweep(k->owner);
        if (k->owner->n_now >= k->owner->n_max) {
            pause_accepting(k->owner, "as many connections as there may be");
            return;
        }
        int fd = accept4(k->fd, (struct sockaddr *)&a, &n, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
            continue;
        if (fd < 0 || admit(k, fd, (struct sockaddr *)&a) < 0) {
            pause_accepting(k->owner, strerror(errno));
            return;
        }
    }
}

/* ---- listeners ---- */

static void close_lock(struct listener *k)
{
    char lock[sizeof k->path + 8];
    if (k->lock_fd < 0)
        return;
    (void)snprintf(lock, sizeof lock, "%s.lock", k->path);
    (void)unlink(lock); /* while it is held; see open_lock() */
    (void)close(k->lock_fd);
    k->lock_fd = -1;
}

static void on_listener_closed(uv_handle_t *h)
{
    free(h->data);
}

static void close_listener(struct listener *k)
{
    struct stat st;
    if (k->path[0] && k->ino && lstat(k->path, &st) == 0 && st.st_dev == k->dev &&
        st.st_ino == k->ino)
        (void)unlink(k->path);
    (void)close(k->fd);
    close_lock(k);
}

/* Holds PATH.lock. A file that was removed by its last holder between open and flock is no lock:
 * then the name leads to another file, or to none, and it is tried again. */
static int open_lock(struct listener *k, delta_error *err)
{
    char lock[sizeof k->path + 8];
    struct stat held, named;
    (void)snprintf(lock, sizeof lock, "%s.lock", k->path);
    for (int i = 0; i < LOCK_TRIES; i++) {
        int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0)
            return delta_fail(err, DELTA_EIO, "%s: %s", lock, strerror(errno));
        if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
            int e = errno;
            (void)close(fd);
            if (e == EWOULDBLOCK)
                return delta_fail(err, DELTA_EBUSY, "%s: in use: another deltad serves this socket",
                                  k->path);
            return delta_fail(err, DELTA_EIO, "%s: %s", lock, strerror(e));
        }
        if (fstat(fd, &held) == 0 && stat(lock, &named) == 0 && held.st_ino == named.st_ino &&
            held.st_dev == named.st_dev) {
            k->lock_fd = fd;
            return 0;
        }
        (void)close(fd);
    }
    return delta_fail(err, DELTA_EBUSY, "%s: others start and stop on it all the time", lock);
}

/* Removes what is left of a dead process at the path; refuses anything else. */
static int clear_path(const struct sockaddr_un *a, delta_error *err)
{
    struct stat st;
    if (lstat(a->sun_path, &st) < 0)
        return errno == ENOENT ? 0
                               : delta_fail(err, DELTA_EIO, "%s: %s", a->sun_path, strerror(errno));
    if (!S_ISSOCK(st.st_mode))
        return delta_fail(err, DELTA_EINVALID, "%s: exists and is no socket", a->sun_path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return delta_fail(err, DELTA_EIO, "%s: %s", a->sun_path, strerror(errno));
    int r = connect(fd, (const struct sockaddr *)a, sizeof *a);
    int e = errno;
    (void)close(fd);
    if (r == 0 || e == EAGAIN)
        return delta_fail(err, DELTA_EBUSY, "%s: in use: another process serves this socket",
                          a->sun_path);
    if (e != ECONNREFUSED && e != ENOENT)
        return delta_fail(err, DELTA_EIO, "%s: %s", a->sun_path, strerror(e));
    if (unlink(a->sun_path) < 0 && errno != ENOENT)
        return delta_fail(err, DELTA_EIO, "%s: %s", a->sun_path, strerror(errno));
    return 0;
}

static int find_group(const char *key, const char *name, gid_t *ret_gid, delta_error *err)
{
    char buffer[16384];
    struct group g, *found = NULL;
    if (getgrnam_r(name, &g, buffer, sizeof buffer, &found) != 0 || !found)
        return delta_fail(err, DELTA_EINVALID, "%s: there is no group %s", key, name);
    *ret_gid = g.gr_gid;
    return 0;
}

static int set_group(const char *path, const char *name, delta_error *err)
{
    gid_t gid;
    int r = find_group("socket_group", name, &gid, err);
    if (r < 0)
        return r;
    if (chown(path, (uid_t)-1, gid) < 0)
        return delta_fail(err, DELTA_EIO, "%s: group %s: %s", path, name, strerror(errno));
    return 0;
}

static int bind_unix(struct listener *k, const dd_config *c, delta_error *err)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    struct stat st;
    (void)snprintf(a.sun_path, sizeof a.sun_path, "%s", k->path);
    int r = open_lock(k, err);
    if (r < 0)
        return r;
    r = clear_path(&a, err);
    if (r < 0)
        return r;
    /* The mode of the descriptor is that of the file to be: never wider than asked for. */
    if (fchmod(k->fd, 0600) < 0 || bind(k->fd, (struct sockaddr *)&a, sizeof a) < 0 ||
        lstat(k->path, &st) < 0)
        return delta_fail(err, DELTA_EIO, "%s: %s", k->path, strerror(errno));
    k->dev = st.st_dev;
    k->ino = st.st_ino;
    if (c->server.socket_group[0]) {
        r = set_group(k->path, c->server.socket_group, err);
        if (r < 0)
            return r;
    }
    if (chmod(k->path, (mode_t)c->server.socket_mode) < 0)
        return delta_fail(err, DELTA_EIO, "%s: %s", k->path, strerror(errno));
    return 0;
}

static int add_listener(dd_listen *l, int fd, enum transport transport, const char *name,
                        struct listener **ret_k, delta_error *err)
{
    struct listener *k = l->n_listeners < LISTENERS_MAX ? calloc(1, sizeof *k) : NULL;
    if (!k || uv_poll_init(l->loop, &k->poll, fd) < 0) {
        (void)close(fd);
        free(k);
        return delta_fail(err, DELTA_EIO, "%s: cannot be listened to", name);
    }
    k->owner = l;
    k->fd = fd;
    k->lock_fd = -1;
    k->transport = transport;
    k->poll.data = k;
    (void)snprintf(k->name, sizeof k->name, "%s", name);
    l->listeners[l->n_listeners++] = k;
    *ret_k = k;
    return 0;
}

static int make_unix(dd_listen *l, const char *path, enum transport transport, delta_error *err)
{
    struct listener *k;
    if (strlen(path) >= sizeof k->path)
        return delta_fail(err, DELTA_EINVALID, "%s: longer than %zu bytes", path,
                          sizeof k->path - 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return delta_fail(err, DELTA_EIO, "%s: %s", path, strerror(errno));
    int r = add_listener(l, fd, transport, path, &k, err);
    if (r < 0)
        return r;
    (void)snprintf(k->path, sizeof k->path, "%s", path);
    r = bind_unix(k, l->config, err);
    if (r < 0)
        return r;
    if (listen(fd, BACKLOG) < 0)
        return delta_fail(err, DELTA_EIO, "%s: %s", path, strerror(errno));
    return 0;
}

/* HOST:PORT, [HOST]:PORT */
static int resolve(const char *text, struct addrinfo **ret_a, delta_error *err)
{
    char host[256];
    const struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV };
    const char *colon = strrchr(text, ':');
    size_t n = colon ? (size_t)(colon - text) : 0;
    if (n == 0 || n >= sizeof host || !colon[1])
        return delta_fail(err, DELTA_EINVALID, "listen: %s is not HOST:PORT", text);
    bool is_bracketed = text[0] == '[' && text[n - 1] == ']' && n > 2;
    (void)snprintf(host, sizeof host, "%.*s", (int)(is_bracketed ? n - 2 : n),
                   text + (is_bracketed ? 1 : 0));
    int r = getaddrinfo(host, colon + 1, &hints, ret_a);
    if (r != 0)
        return delta_fail(err, DELTA_EINVALID, "listen: %s: %s", text, gai_strerror(r));
    return 0;
}

static int check_remote(const dd_listen *l, const struct sockaddr *a, const char *name,
                        delta_error *err)
{
    if (is_loopback(a) || l->config->server.allow_remote)
        return 0;
    return delta_fail(err, DELTA_EINVALID,
                      "%s is open to other machines, and there is neither encryption nor "
                      "authentication on TCP: set server.allow_remote if that is meant",
                      name);
}

static int make_tcp(dd_listen *l, const char *text, delta_error *err)
{
    struct addrinfo *a;
    struct listener *k;
    int on = 1;
    int r = resolve(text, &a, err);
    if (r < 0)
        return r;
    r = check_remote(l, a->ai_addr, text, err);
    int fd = r < 0 ? -1 : socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (r == 0 && fd < 0)
        r = delta_fail(err, DELTA_EIO, "%s: %s", text, strerror(errno));
    if (r == 0)
        r = add_listener(l, fd, GRPC, text, &k, err);
    if (r == 0 && (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0 ||
                   bind(fd, a->ai_addr, a->ai_addrlen) < 0 || listen(fd, BACKLOG) < 0))
        r = delta_fail(err, errno == EADDRINUSE ? DELTA_EBUSY : DELTA_EIO, "%s: %s", text,
                       strerror(errno));
    freeaddrinfo(a);
    if (r == 0) { /* port 0 is any: say which */
        struct sockaddr_storage got;
        socklen_t n = sizeof got;
        if (getsockname(fd, (struct sockaddr *)&got, &n) == 0)
            print_address((struct sockaddr *)&got, k->name, sizeof k->name);
    }
    return r;
}

static int inherit(dd_listen *l, int fd, const char *name, bool *have, delta_error *err)
{
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    struct listener *k;
    bool is_grpc = strcmp(name, "grpc") == 0, is_ttrpc = strcmp(name, "ttrpc") == 0;
    if (!is_grpc && !is_ttrpc)
        return delta_fail(err, DELTA_EINVALID,
                          "a socket named \"%s\" was inherited; FileDescriptorName= must be grpc "
                          "or ttrpc",
                          name);
    if (sd_is_socket(fd, AF_UNSPEC, SOCK_STREAM, 1) <= 0 ||
        getsockname(fd, (struct sockaddr *)&a, &n) < 0)
        return delta_fail(err, DELTA_EINVALID, "inherited %s: not a listening stream socket", name);
    if (is_ttrpc && a.ss_family != AF_UNIX)
        return delta_fail(err, DELTA_EINVALID, "inherited ttrpc: not a Unix socket");
    int r = check_remote(l, (struct sockaddr *)&a, "an inherited socket", err);
    if (r < 0)
        return r;
    r = add_listener(l, fd, is_grpc ? GRPC : TTRPC, name, &k, err);
    if (r < 0)
        return r;
    k->is_inherited = true;
    have[k->transport] = true;
    return 0;
}

static int open_all(dd_listen *l, delta_error *err)
{
    const dd_config *c = l->config;
    bool have[2] = { false };
    char **names = NULL;
    int r = 0, n = sd_listen_fds_with_names(1, &names);
    if (n < 0)
        return delta_fail(err, DELTA_EIO, "inherited sockets: %s", strerror(-n));
    for (int i = 0; i < n; i++)
        if (r == 0)
            r = inherit(l, SD_LISTEN_FDS_START + i, names[i], have, err);
    for (int i = 0; i < n; i++)
        free(names[i]);
    free(names);
    if (r == 0 && !have[GRPC] && c->server.socket[0])
        r = make_unix(l, c->server.socket, GRPC, err);
    if (r == 0 && !have[TTRPC] && c->server.ttrpc_socket[0])
        r = make_unix(l, c->server.ttrpc_socket, TTRPC, err);
    if (r == 0 && c->server.listen[0])
        r = make_tcp(l, c->server.listen, err);
    if (r == 0 && !l->n_listeners)
        r = delta_fail(err, DELTA_EINVALID, "there is no socket to listen on");
    return r;
}

/* ---- life ---- */

static void free_listen(dd_listen *l)
{
    for (int fd = 0; l->by_fd && fd < l->by_fd_size; fd++)
        free(l->by_fd[fd]);
    free(l->by_fd);
    free(l->users);
    free(l);
}

static void on_handle_closed(uv_handle_t *h)
{
    dd_listen *l = h->data;
    if (--l->n_handles == 0)
        free_listen(l);
}

static void close_handles(dd_listen *l)
{
    dd_listen_stop(l);
    uv_close((uv_handle_t *)&l->pause, on_handle_closed);
    uv_close((uv_handle_t *)&l->sweep, on_handle_closed);
}

static int make_tables(dd_listen *l, delta_error *err)
{
    struct rlimit fds;
    uint32_t max = l->config->server.max_connections;
    if (getrlimit(RLIMIT_NOFILE, &fds) == 0 && fds.rlim_cur != RLIM_INFINITY &&
        fds.rlim_cur < (rlim_t)max + FDS_BESIDE)
        max = fds.rlim_cur > 2 * FDS_BESIDE ? (uint32_t)fds.rlim_cur - FDS_BESIDE : FDS_BESIDE;
    if (max < l->config->server.max_connections)
        dd_log(DD_LOG_NOTICE, "%u connections at most, for the limit of open files (%llu)", max,
               (unsigned long long)fds.rlim_cur);
    l->n_max = max;
    l->next_fd = FD_BASE;
    l->by_fd_size = FD_BASE + FDS_BESIDE + FD_ROUNDS * (int)max;
    l->by_fd = calloc((size_t)l->by_fd_size, sizeof *l->by_fd);
    l->users = calloc((size_t)max, sizeof *l->users);
    if (!l->by_fd || !l->users)
        return delta_fail(err, DELTA_ENOMEM, "tables of %u connections", max);
    return 0;
}

int dd_listen_new(uv_loop_t *loop, const dd_config *c, dd_service *s, dd_listen **ret_l,
                  delta_error *err)
{
    dd_listen *l = calloc(1, sizeof *l);
    if (!l)
        return delta_fail(err, DELTA_ENOMEM, "listen: %zu bytes", sizeof *l);
    l->loop = loop;
    l->config = c;
    l->service = s;
    (void)uv_timer_init(loop, &l->pause);
    (void)uv_timer_init(loop, &l->sweep);
    l->pause.data = l->sweep.data = l;
    l->n_handles = 2;
    l->has_admin_group = c->policy.admin_group[0] != '\0';
    int r = make_tables(l, err);
    if (r == 0 && l->has_admin_group)
        r = find_group("admin_group", c->policy.admin_group, &l->admin_group, err);
    if (r == 0)
        r = open_all(l, err);
    if (r == 0)
        r = dd_ttrpc_server_new(loop, c, s, on_ttrpc_closed, l, &l->ttrpc, err);
    if (r == 0)
        r = dd_grpc_server_new(loop, c, s, peer_of, l, &l->grpc, err);
    if (r < 0) {
        dd_ttrpc_server_free(l->ttrpc);
        close_handles(l);
        return r;
    }
    *ret_l = l;
    return 0;
}

void dd_listen_start(dd_listen *l)
{
    for (size_t i = 0; i < l->n_listeners; i++)
        dd_log(DD_LOG_INFO, "listening: %s on %s%s",
               l->listeners[i]->transport == GRPC ? "gRPC" : "ttrpc",
               l->listeners[i]->is_inherited ? "an inherited socket, " : "", l->listeners[i]->name);
    poll_all(l);
}

void dd_listen_stop(dd_listen *l)
{
    (void)uv_timer_stop(&l->pause);
    for (size_t i = 0; i < l->n_listeners; i++) {
        struct listener *k = l->listeners[i];
        (void)uv_poll_stop(&k->poll);
        close_listener(k);
        uv_close((uv_handle_t *)&k->poll, on_listener_closed);
    }
    l->n_listeners = 0;
}

static void on_transport_gone(void *arg)
{
    dd_listen *l = arg;
    if (--l->n_going == 0)
        l->on_gone(l->on_gone_arg);
}

void dd_listen_shutdown(dd_listen *l, bool now, void (*on_gone)(void *arg), void *arg)
{
    dd_listen_stop(l);
    while (l->pending)
        (void)close(unpend(l->pending));
    if (!l->on_gone) {
        l->on_gone = on_gone;
        l->on_gone_arg = arg;
        l->n_going = 2;
    }
    dd_ttrpc_server_shutdown(l->ttrpc, now, on_transport_gone, l);
    dd_grpc_server_shutdown(l->grpc, now, on_transport_gone, l);
}

void dd_listen_free(dd_listen *l)
{
    if (!l)
        return;
    dd_grpc_server_free(l->grpc);
    dd_ttrpc_server_free(l->ttrpc);
    close_handles(l);
}
