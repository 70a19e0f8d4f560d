"""Both transports over echo handlers: calls, limits and faults, with stock clients.

The program is transport_echo_server (tests/daemon/echo), which needs no model.
"""
import grp
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import ttrpc  # noqa: E402
from support.daemon import BUILD, Daemon, grpc, module  # noqa: E402

ECHO = BUILD / "tests/transport_echo_server"
METHOD = "/test.Echo/"


def start(**options):
    d = Daemon(program=ECHO, wait=False, **options)
    try:
        d.wait_listening()
    except BaseException:
        d.stop()
        raise
    return d


def unary(channel, name, message=b"", **more):
    more.setdefault("timeout", 20)
    return channel.unary_unary(METHOD + name)(message, **more)


def stats(d):
    """live calls, calls seen closed, connections, connections in all, messages sent"""
    with ttrpc.Client(str(d.ttrpc)) as c:
        return [int(x) for x in c.unary(METHOD + "Stats", b"").split()]


class Base(unittest.TestCase):
    options = {}

    def setUp(self):
        self.d = start(**self.options)
        self.addCleanup(self.end)

    def end(self):
        self.assertEqual(self.d.stop(), 0, self.d.last_log)
        self.assertNotIn("runtime error", self.d.last_log)
        self.assertNotIn("AddressSanitizer", self.d.last_log)

    def rejects(self, code, call):
        with self.assertRaises(grpc.RpcError) as caught:
            call()
        self.assertEqual(caught.exception.code(), code, caught.exception.details())
        return caught.exception


class Grpc(Base):
    options = {"tcp": True, "server": {"max_message_bytes": 1 << 20}}

    def test_unary_stream_and_peer(self):
        c = self.d.channel()
        self.assertEqual(unary(c, "Unary", b"hello"), b"hello")
        self.assertEqual(unary(c, "Unary", b""), b"")
        big = os.urandom(1000000)
        self.assertEqual(unary(c, "Unary", big), big)
        got = list(c.unary_stream(METHOD + "Stream")(b"500 100", timeout=20))
        self.assertEqual(got, [b"x" * 100] * 500)
        text = unary(c, "Peer", metadata=[("x-request-id", "id 7")], timeout=30).decode()
        peer, request_id, left = text.split("|")
        self.assertEqual(peer, f"unix uid {os.getuid()} pid {os.getpid()}")
        self.assertEqual(request_id, "id_7")
        self.assertTrue(28000 < int(left) <= 31000, left)
        tcp = unary(self.d.channel(self.d.tcp_address), "Peer").decode()
        self.assertRegex(tcp, r"^127\.0\.0\.1:\d+\|")

    def test_status_with_details(self):
        e = self.rejects(grpc.StatusCode.INVALID_ARGUMENT,
                         lambda: unary(self.d.channel(), "Fail"))
        self.check_details(dict(e.trailing_metadata())["grpc-status-details-bin"])
        with ttrpc.Client(str(self.d.ttrpc)) as c, self.assertRaises(ttrpc.Error) as caught:
            c.unary(METHOD + "Fail", b"")
        self.assertEqual(caught.exception.code, 3)
        self.check_details(caught.exception.status)

    def check_details(self, data):
        errors = module("google/rpc/error_details.proto")
        status = module("google/rpc/status.proto").Status.FromString(data)
        self.assertEqual((status.code, status.message), (3, "top_p is wrong ?"))
        info, bad, retry = errors.ErrorInfo(), errors.BadRequest(), errors.RetryInfo()
        for message, detail in zip((info, bad, retry), status.details, strict=True):
            self.assertTrue(detail.Unpack(message), detail.type_url)
        self.assertEqual((info.reason, info.domain, dict(info.metadata)),
                         ("FIELD_INVALID", "deltad", {"limit": "1"}))
        self.assertEqual(bad.field_violations[0].field, "sampling.top_p")
        self.assertEqual((retry.retry_delay.seconds, retry.retry_delay.nanos), (1, 500000000))

    def test_codes_of_the_transport(self):
        c = self.d.channel()
        code = grpc.StatusCode
        e = self.rejects(code.UNIMPLEMENTED, lambda: unary(c, "Nothing"))
        self.assertIn("/test.Echo/Nothing", e.details())
        self.rejects(code.RESOURCE_EXHAUSTED, lambda: unary(c, "Unary", b"x" * (2 << 20)))
        self.rejects(code.DEADLINE_EXCEEDED, lambda: unary(c, "Slow", timeout=0.2))
        self.rejects(code.UNIMPLEMENTED, lambda: unary(c, "Unary", b"x" * 1000,
                                                       compression=grpc.Compression.Gzip))
        self.rejects(code.RESOURCE_EXHAUSTED,
                     lambda: unary(c, "Unary", metadata=[("k", "v" * 20000)]))
        # gRPC core may end a connection over its metadata limit; the daemon is still here
        self.assertEqual(unary(self.d.channel(), "Unary", b"still here"), b"still here")
        self.d.wait_until(lambda: stats(self.d)[0] == 0)

    def test_cancel_is_seen_at_once(self):
        c = self.d.channel()
        call = c.unary_stream(METHOD + "Stream")(b"0 24")
        for _ in range(100):
            next(call)
        call.cancel()
        self.d.wait_until(lambda: stats(self.d)[:2] == [0, 1], 2)
        slow = c.unary_unary(METHOD + "Slow").future(b"")
        self.d.wait_until(lambda: stats(self.d)[0] == 1, 2)
        slow.cancel()
        self.d.wait_until(lambda: stats(self.d)[0] == 0, 2)

    def test_streams_beside_one_another(self):
        c = self.d.channel()
        calls = [c.unary_stream(METHOD + "Stream")(b"300 50", timeout=30) for _ in range(32)]
        self.assertEqual([sum(1 for _ in k) for k in calls], [300] * 32)

    def test_reflection(self):
        from google.protobuf import descriptor_pb2, descriptor_pool
        for version in "v1", "v1alpha":
            r = module(f"grpc/reflection/{version}/reflection.proto")
            stub = self.d.stub(f"grpc/reflection/{version}/reflection.proto", "ServerReflection")
            ask = r.ServerReflectionRequest
            questions = [ask(list_services="*", host="h"),
                         ask(file_containing_symbol="deltad.v1.InferenceService"),
                         ask(file_containing_symbol="deltad.v1.InferenceService.Chat"),
                         ask(file_containing_symbol="deltad.v1.ToolChoice.AllowedTools.names"),
                         ask(file_by_filename="deltad/v1/types.proto"),
                         ask(file_containing_symbol="deltad.v1.Nothing"),
                         ask(file_by_filename="nothing.proto"), ask(),
                         ask(all_extension_numbers_of_type="deltad.v1.Tool")]
            answers = list(stub.ServerReflectionInfo(iter(questions), timeout=20))
            self.assertEqual([a.original_request for a in answers], questions)
            self.assertEqual(answers[0].valid_host, "h")
            names = [s.name for s in answers[0].list_services_response.service]
            for name in ("deltad.v1.InferenceService", "deltad.v1.SessionService",
                         "deltad.v1.ModelService", "grpc.health.v1.Health",
                         "grpc.reflection.v1.ServerReflection"):
                self.assertIn(name, names)
            pool = descriptor_pool.DescriptorPool()
            for data in answers[1].file_descriptor_response.file_descriptor_proto:
                pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
            service = pool.FindServiceByName("deltad.v1.InferenceService")
            self.assertIn("Chat", service.methods_by_name)
            self.assertEqual(answers[2].file_descriptor_response,
                             answers[1].file_descriptor_response)
            for a in answers[3:5]:
                files = a.file_descriptor_response.file_descriptor_proto
                last = descriptor_pb2.FileDescriptorProto.FromString(files[-1])
                self.assertEqual(last.name, "deltad/v1/types.proto")
            self.assertEqual([a.error_response.error_code for a in answers[5:]], [5, 5, 3, 5])
            # garbage, and a client that goes away inside
            self.rejects(grpc.StatusCode.INVALID_ARGUMENT, lambda: list(
                self.d.channel().stream_stream(
                    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")(
                        iter([b"\x3a\x05ab"]), timeout=20)))


class Stalled(Base):
    options = {"limits": {"stall_limit": "1s"}}

    def test_a_reader_that_stalls_on_gRPC_is_cut_and_others_go_on(self):
        stalled = self.d.channel().unary_stream(METHOD + "Stream")(b"0 1000")
        next(stalled)
        other = self.d.channel().unary_stream(METHOD + "Stream")(b"20000 24", timeout=60)
        self.assertEqual(sum(1 for _ in other), 20000)
        self.d.wait_until(lambda: stats(self.d)[0] == 0, 20, "the stalled call lives on")
        with self.assertRaises(grpc.RpcError) as caught:
            for _ in stalled:
                pass
        self.assertEqual(caught.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)

    def test_a_reader_that_stalls_on_ttrpc_is_cut_and_its_queue_bounded(self):
        with ttrpc.Client(str(self.d.ttrpc)) as c:
            c.start(METHOD + "Stream", b"0 1000")
            self.d.wait_until(lambda: stats(self.d)[4] > 60, 5)
            time.sleep(0.3)
            sent = stats(self.d)[4]
            time.sleep(0.2)
            self.assertEqual(stats(self.d)[4], sent, "it goes on producing")
            self.assertLess(sent, 600)  # 64 KiB of ours and what the kernel holds
            self.d.wait_until(lambda: stats(self.d)[0] == 0, 5)
            time.sleep(2)  # he has had his second chance
            with self.assertRaises((EOFError, ConnectionError)):
                while True:
                    c.read_frame()

    def test_a_reader_that_stalls_on_ttrpc_and_reads_on_is_told_why(self):
        with ttrpc.Client(str(self.d.ttrpc)) as c:
            streams = [c.start(METHOD + "Stream", b"0 1000") for _ in range(2)]
            self.d.wait_until(lambda: stats(self.d)[0] == 2, 5)
            self.d.wait_until(lambda: stats(self.d)[0] == 0, 5)
            for s in streams:
                with self.assertRaises(ttrpc.Error) as caught:
                    for _ in c.messages(s):
                        pass
                self.assertEqual(caught.exception.code, 8)
                self.assertIn("stall_limit", str(caught.exception))
            self.assertEqual(c.unary(METHOD + "Unary", b"abc"), b"abc")


class Ttrpc(Base):
    def client(self):
        c = ttrpc.Client(str(self.d.ttrpc))
        self.addCleanup(c.close)
        return c

    def test_calls_beside_one_another(self):
        c = self.client()
        slow = c.start(METHOD + "Slow", b"")
        streams = [c.start(METHOD + "Stream", b"200 64") for _ in range(16)]
        self.assertEqual(c.unary(METHOD + "Unary", b"abc"), b"abc")
        self.assertEqual([list(c.messages(s)) for s in streams], [[b"x" * 64] * 200] * 16)
        self.assertEqual(c.waiting[slow], [])
        big = os.urandom(3 << 20)
        self.assertEqual(c.unary(METHOD + "Unary", big), big)
        c.close()
        self.d.wait_until(lambda: stats(self.d)[0] == 0, 2, "closing does not cancel")

    def rejected(self, call):
        with self.assertRaises(ttrpc.Error) as caught:
            call()
        return caught.exception.code

    def test_codes_of_the_transport(self):
        c = self.client()
        self.assertEqual(self.rejected(lambda: c.unary(METHOD + "Nothing", b"")), 12)
        reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        self.assertEqual(self.rejected(lambda: c.unary(reflection, b"")), 12)
        begun = time.monotonic()
        late = self.rejected(lambda: c.unary(METHOD + "Slow", b"", timeout_ns=200000000))
        self.assertEqual(late, 4)
        self.assertTrue(0.15 < time.monotonic() - begun < 2)
        self.assertEqual(self.rejected(lambda: c.unary(METHOD + "Unary", b"", timeout_ns=-1)), 4)
        self.assertEqual(
            self.rejected(lambda: list(c.stream(METHOD + "Stream", b"1 4194305"))), 8)
        stream = c.next_stream
        c.next_stream += 2
        c.waiting[stream] = []
        c.send_frame(stream, ttrpc.REQUEST, 1, b"\xff\xff")
        self.assertEqual(self.rejected(lambda: c.result(stream)), 3)
        slow = c.start(METHOD + "Slow", b"")
        c.send_frame(slow, ttrpc.DATA, ttrpc.CLOSED, b"more")
        self.assertEqual(self.rejected(lambda: c.result(slow)), 3)
        peer = c.unary(METHOD + "Peer", b"", timeout_ns=10**10,
                       metadata=[("a", "b"), ("x-request-id", "r9")]).decode().split("|")
        self.assertEqual(peer[:2], [f"unix uid {os.getuid()} pid {os.getpid()}", "r9"])
        self.assertTrue(9000 < int(peer[2]) <= 10000, peer)
        for _ in range(64):
            c.start(METHOD + "Slow", b"")
        self.assertEqual(self.rejected(lambda: c.unary(METHOD + "Unary", b"")), 8)
        c.close()
        self.d.wait_until(lambda: stats(self.d)[0] == 0)

    def test_hostile_frames_close_their_connection_only(self):
        good = self.client()
        slow = good.start(METHOD + "Slow", b"")
        h = ttrpc.HEADER.pack
        request = ttrpc.field(1, b"test.Echo") + ttrpc.field(2, b"Slow")
        first = h(len(request), 1, 1, 1) + request
        for data in (h(0, 2, 1, 0), h(0, 0, 1, 0), h(0, 1, 2, 0), h(0, 1, 9, 0), h(0, 1, 1, 128),
                     h(5 << 20, 1, 1, 0), h(0xffffffff, 1, 1, 0), h(0, 7, 3, 0),
                     h(1, 1, 1, 4) + b"x", first + first, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64):
            c = self.client()
            c.socket.sendall(data)
            with self.assertRaises((EOFError, ConnectionError), msg=data):
                c.read_frame()
        for cut in range(1, len(first), 3):  # and those that stop inside
            c = self.client()
            c.socket.sendall(first[:cut])
            c.close()
        self.assertEqual(good.unary(METHOD + "Unary", b"fine"), b"fine")
        self.assertEqual(good.waiting[slow], [])
        good.close()
        self.d.wait_until(lambda: stats(self.d)[0] == 0)

    def test_a_flood_without_reading_is_not_queued(self):
        c = self.client()
        c.socket.settimeout(1)
        with self.assertRaises((TimeoutError, ConnectionError)):
            for _ in range(100000):
                c.start(METHOD + "Unary", b"y" * 4096)
        self.assertLessEqual(stats(self.d)[0], 64)  # the ones whose answers wait
        with open(f"/proc/{self.d.process.pid}/status") as f:
            kib = int([line for line in f if line.startswith("VmRSS")][0].split()[1])
        self.assertLess(kib, 200000)


KILLED = """
import sys, grpc
c = grpc.insecure_channel(sys.argv[1])
s = c.unary_stream("/test.Echo/Stream")(b"0 24")
next(s)
print("up", flush=True)
for _ in s: pass
"""


class Faults(Base):
    options = {"tcp": True}

    def test_killed_clients_are_seen_within_milliseconds(self):
        for address in (self.d.address, self.d.tcp_address):
            p = subprocess.Popen([sys.executable, "-c", KILLED, address], stdout=subprocess.PIPE)
            p.stdout.readline()
            with ttrpc.Client(str(self.d.ttrpc)) as c:
                def live():
                    return int(c.unary(METHOD + "Stats", b"").split()[0])
                self.assertEqual(live(), 1)
                p.send_signal(signal.SIGKILL)
                begun = time.monotonic()
                while live():
                    self.assertLess(time.monotonic() - begun, 2)
                took = time.monotonic() - begun
            p.wait()
            p.stdout.close()
            print(f"# killed client seen after {took * 1000:.1f} ms on {address}")

    def test_second_instance_is_refused_and_the_first_lives(self):
        second = Daemon(program=ECHO, wait=False, folder=self.d.folder)
        second.process.wait(10)
        self.assertEqual(second.process.returncode, 2)
        self.assertIn("in use: another deltad serves this socket", second.log)
        self.assertIn(str(self.d.socket), second.log)
        self.assertEqual(unary(self.d.channel(), "Unary", b"a"), b"a")
        port = self.d.tcp_address.rsplit(":", 1)[1]
        third = Daemon(program=ECHO, wait=False, server={"listen": f"127.0.0.1:{port}"})
        third.process.wait(10)
        self.assertIn("Address already in use", third.log)
        third.stop()

    def test_garbage_on_the_grpc_socket(self):
        for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(100000),
                     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000):
            s = socket.socket(socket.AF_UNIX)
            s.connect(str(self.d.socket))
            try:
                s.sendall(data)
                s.settimeout(5)
                while s.recv(65536):
                    pass
            except ConnectionError:
                pass
            s.close()
        self.assertEqual(unary(self.d.channel(), "Unary", b"a"), b"a")

    def test_peers_that_answer_no_ping_are_dropped(self):
        """As those of half-open TCP: within 25 s, whether they ever spoke HTTP/2 or not."""
        host, port = self.d.tcp_address.split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(4)]
        for s in silent[:2]:
            s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        self.d.wait_until(lambda: stats(self.d)[2] == 5)
        begun = time.monotonic()
        self.d.wait_until(lambda: stats(self.d)[2] == 1, 30, "silent peers stay")
        print(f"# silent peers dropped after {time.monotonic() - begun:.1f} s")
        for s in silent:
            s.close()

    def test_connections_are_counted_out(self):
        channels = [self.d.channel() for _ in range(20)]
        for c in channels:
            unary(c, "Unary", b"")
        self.assertGreaterEqual(stats(self.d)[2], 21)
        for c in channels:
            c.close()
        self.d.wait_until(lambda: stats(self.d)[2] == 1, 5, "connections are never forgotten")


class Starved(unittest.TestCase):
    def burst(self, d, n):
        held = []
        for _ in range(n):
            s = socket.socket(socket.AF_UNIX)
            s.setblocking(False)
            try:
                s.connect(str(d.socket))
            except BlockingIOError:  # the backlog is full
                time.sleep(0.001)
            held.append(s)
        return held

    def check(self, d):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        held = self.burst(d, 1300)
        time.sleep(0.5)
        before = d.cpu_seconds()
        time.sleep(2)
        busy = (d.cpu_seconds() - before) / 2
        self.assertLess(busy, 0.1, "it spins while it is full")
        for s in held:
            s.close()
        # The daemon is measured: while its backlog is still full a client's connect fails at once,
        # and gRPC's own would wait for a second before it tries again.
        channel = d.channel(**{"grpc.initial_reconnect_backoff_ms": 50})
        begun = time.monotonic()
        self.assertEqual(unary(channel, "Unary", b"new", wait_for_ready=True), b"new")
        took = time.monotonic() - begun
        print(f"# full: {busy * 100:.1f} % CPU; new client served after {took * 1000:.0f} ms")
        self.assertLess(took, 1)

    def test_beyond_the_limit_of_connections(self):
        d = start(wrap=("prlimit", "--nofile=1100:1100"),
                  server={"max_connections_per_uid": 65536, "max_connections": 65536})
        self.addCleanup(d.stop)
        self.check(d)

    def test_when_descriptors_have_run_out(self):
        d = start(server={"max_connections_per_uid": 1024})
        self.addCleanup(d.stop)
        # after its start, so that the limit is not foreseen and accept fails with EMFILE
        resource.prlimit(d.process.pid, resource.RLIMIT_NOFILE, (200, 200))
        self.check(d)
        self.assertIn("Too many open files", d.log)

    def test_a_user_may_have_so_many(self):
        d = start(server={"max_connections_per_uid": 5})
        self.addCleanup(d.stop)
        held = self.burst(d, 5)
        time.sleep(0.2)
        with self.assertRaises((EOFError, ConnectionError)):
            with ttrpc.Client(str(d.ttrpc)) as c:
                c.unary(METHOD + "Unary", b"")
        for s in held:
            s.close()

        def is_free():
            try:
                return stats(d)[2] == 1
            except (EOFError, ConnectionError):
                return False
        d.wait_until(is_free)


class Stop(unittest.TestCase):
    def test_sockets_go_and_calls_are_cut(self):
        d = start()
        call = d.channel().unary_stream(METHOD + "Stream")(b"0 24")
        next(call)
        t = ttrpc.Client(str(d.ttrpc))
        t.start(METHOD + "Slow", b"")
        idle = socket.socket(socket.AF_UNIX)
        idle.connect(str(d.socket))
        d.wait_until(lambda: stats(d)[0] == 2)
        d.process.send_signal(signal.SIGTERM)
        self.assertEqual(d.process.wait(10), 0, d.log)
        self.assertEqual([p.name for p in d.folder.iterdir() if "sock" in p.name], [])
        with self.assertRaises(grpc.RpcError):
            for _ in call:
                pass
        t.close()
        idle.close()
        d.stop()

    def test_a_killed_daemon_leaves_a_socket_that_is_replaced(self):
        d = start()
        os.kill(d.process.pid, signal.SIGKILL)
        d.process.wait()
        self.assertTrue(d.socket.exists())
        again = Daemon(program=ECHO, wait=False, folder=d.folder)
        again.wait_listening()
        self.assertEqual(unary(again.channel(), "Unary", b"b"), b"b")
        again.stop()
        d.stop()


class Sockets(unittest.TestCase):
    def refused(self, why, **options):
        d = Daemon(program=ECHO, wait=False, **options)
        d.process.wait(10)
        self.assertIn(d.process.returncode, (1, 2), d.log)  # by the configuration, or here
        self.assertIn(why, d.log)
        if "folder" not in options:
            d.stop()

    def test_mode_and_group(self):
        d = start(server={"socket_mode": "0640", "socket_group": grp.getgrgid(os.getgid())[0]})
        st = d.socket.stat()
        self.assertEqual((oct(st.st_mode & 0o777), st.st_gid), ("0o640", os.getgid()))
        self.assertEqual(d.stop(), 0)

    def test_what_is_refused(self):
        self.refused("loopback", server={"listen": "0.0.0.0:0"})
        self.refused("No such file or directory", server={"socket": "/nonexistent/a.sock"})
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "file")
            path.write_text("precious")
            self.refused("exists and is no socket", server={"socket": path})
            self.assertEqual(path.read_text(), "precious")

    def test_a_live_socket_of_another_program_is_refused(self):
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as s:
            path = pathlib.Path(folder, "x.sock")
            s.bind(str(path))
            s.listen(1)
            self.refused("in use: another process serves this socket", server={"socket": path})
            self.assertTrue(path.exists())

    def test_of_instances_that_start_at_once_one_wins(self):
        with tempfile.TemporaryDirectory() as folder:
            stale = socket.socket(socket.AF_UNIX)
            stale.bind(f"{folder}/grpc.sock")
            stale.close()
            all_ = [Daemon(program=ECHO, wait=False, folder=folder) for _ in range(6)]
            all_[0].wait_until(lambda: sum(d.process.poll() is not None for d in all_) == 5
                               or all(d.process.poll() is not None for d in all_))
            time.sleep(0.2)
            alive = [d for d in all_ if d.process.poll() is None]
            self.assertEqual(len(alive), 1)
            alive[0].wait_listening()
            self.assertEqual(unary(alive[0].channel(), "Unary", b"c"), b"c")
            for d in all_:
                d.stop()

    def test_inherited_sockets_serve_and_stay(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "inherited.sock")
            s = socket.socket(socket.AF_UNIX)
            s.bind(str(path))
            s.listen(16)
            early = grpc.insecure_channel(f"unix://{path}")  # waits in the backlog
            call = early.unary_unary(METHOD + "Unary").future(b"early", timeout=20)
            shell = 'exec 3<&$FD; export LISTEN_PID=$$; exec "$@"'
            os.set_inheritable(s.fileno(), True)
            config = pathlib.Path(folder, "c.conf")
            config.write_text(f"[server]\nsocket = {folder}/unused.sock\nttrpc_socket =\n")
            p = subprocess.Popen(["bash", "-c", shell, "sh", ECHO, "--config", config],
                                 close_fds=False, stderr=subprocess.PIPE,
                                 env={**os.environ, "FD": str(s.fileno()), "LISTEN_FDS": "1",
                                      "LISTEN_FDNAMES": "grpc"})
            s.close()
            try:
                self.assertEqual(call.result(), b"early")
                self.assertFalse(pathlib.Path(folder, "unused.sock").exists())
            finally:
                early.close()
                p.terminate()
                _, log = p.communicate(timeout=10)
            self.assertEqual(p.returncode, 0, log)
            self.assertTrue(path.exists(), "an inherited socket was removed")


if __name__ == "__main__":
    unittest.main(verbosity=1)
