"""deltad itself on the demo model: clients that die, both transports, a second instance, drain."""
import pathlib
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

GENERATE = "/deltad.v1.InferenceService/Generate"
CLIENT = """
import sys, grpc
c = grpc.insecure_channel(sys.argv[1])
s = c.unary_stream(sys.argv[2])(bytes.fromhex(sys.argv[3]))
next(s)
print("up", flush=True)
for _ in s: pass
"""


def request(max_tokens=100000):
    r = module("deltad/v1/inference.proto").GenerateRequest(text="hello")
    r.stopping.max_tokens = max_tokens
    r.stopping.ignore_eos = True
    return r.SerializeToString()


class Faults(unittest.TestCase):
    def setUp(self):
        self.d = Daemon(tcp=True)
        self.addCleanup(self.d.stop)
        self.model = self.d.module("deltad/v1/model.proto")
        self.stub = self.d.stub("deltad/v1/model.proto", "ModelService")

    def stats(self):
        return self.stub.GetStats(self.model.GetStatsRequest(), timeout=10)

    def wait_running(self, n):
        self.d.wait_until(lambda: self.stats().requests_running == n, 10,
                          f"{n} requests do not run")

    def check_idle(self):
        self.wait_running(0)
        before = self.stats()
        time.sleep(0.2)
        self.assertEqual(self.stats().completion_tokens_total, before.completion_tokens_total)
        self.assertEqual(before.slots_used, 0)

    def test_a_killed_client_frees_its_slot(self):
        for address in (self.d.address, self.d.tcp_address):
            p = subprocess.Popen([sys.executable, "-c", CLIENT, address, GENERATE,
                                  request().hex()], stdout=subprocess.PIPE)
            p.stdout.readline()
            self.wait_running(1)
            p.kill()
            begun = time.monotonic()
            while self.stats().slots_used:
                self.assertLess(time.monotonic() - begun, 5)
            print(f"# slot free {(time.monotonic() - begun) * 1000:.0f} ms after the kill")
            p.wait()
            p.stdout.close()
            self.check_idle()

    def test_a_ttrpc_connection_that_closes_frees_its_slot(self):
        with ttrpc.Client(str(self.d.ttrpc)) as c:
            c.start(GENERATE, request())
            c.read_frame()
            self.wait_running(1)
        self.check_idle()

    def test_both_transports_say_the_same(self):
        inference = module("deltad/v1/inference.proto")
        r = inference.GenerateRequest(text="A river is")
        r.sampling.temperature = 0
        r.stopping.max_tokens = 12
        data = r.SerializeToString()

        def text(messages):
            events = [inference.GenerateEvent.FromString(m) for m in messages]
            self.assertEqual(events[-1].WhichOneof("event"), "finished")
            return "".join(e.text.text for e in events if e.WhichOneof("event") == "text")
        by_grpc = text(self.d.channel().unary_stream(GENERATE)(data, timeout=30))
        with ttrpc.Client(str(self.d.ttrpc)) as c:
            by_ttrpc = text(c.stream(GENERATE, data))
        self.assertTrue(by_grpc)
        self.assertEqual(by_grpc, by_ttrpc)

    def test_hostile_bytes_are_invalid_arguments(self):
        for data in (b"\xff" * 20, request()[:-1] + b"\xff", b"\x0a\x04\xff\xfe\xfd\xfc"):
            with self.assertRaises(grpc.RpcError) as caught:
                list(self.d.channel().unary_stream(GENERATE)(data, timeout=20))
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            with ttrpc.Client(str(self.d.ttrpc)) as c, self.assertRaises(ttrpc.Error) as caught:
                list(c.stream(GENERATE, data))
            self.assertEqual(caught.exception.code, 3)

    def test_reflection_is_for_the_unix_socket_alone_by_default(self):
        r = module("grpc/reflection/v1/reflection.proto")

        def ask(address):
            stub = self.d.stub("grpc/reflection/v1/reflection.proto", "ServerReflection",
                               self.d.channel(address))
            question = r.ServerReflectionRequest(list_services="")
            return [s.name for a in stub.ServerReflectionInfo(iter([question]), timeout=20)
                    for s in a.list_services_response.service]
        self.assertIn("deltad.v1.InferenceService", ask(self.d.address))
        with self.assertRaises(grpc.RpcError) as caught:
            ask(self.d.tcp_address)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNIMPLEMENTED)

    def test_second_instance_is_refused_and_the_first_lives(self):
        second = Daemon(wait=False, folder=self.d.folder)
        self.assertEqual(second.process.wait(20), 78, second.log)
        self.assertIn("in use: another deltad serves this socket", second.log)
        self.stats()

    def test_new_calls_are_turned_away_while_an_answer_runs_on(self):
        call = self.d.channel().unary_stream(GENERATE)(request(300), timeout=60)
        next(call)
        self.d.process.send_signal(signal.SIGTERM)
        self.d.wait_until(lambda: "SIGTERM" in self.d.log)
        with self.assertRaises(grpc.RpcError) as caught:
            self.d.channel().unary_stream(GENERATE)(request(1), timeout=20).next()
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)
        with self.assertRaises(OSError), socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.d.socket))
        for _ in call:
            pass
        self.assertEqual(call.code(), grpc.StatusCode.OK)
        self.assertEqual(self.d.process.wait(20), 0, self.d.log)

    def last_words(self, call):
        """The last event and the status of a stream of Generate."""
        inference, last = module("deltad/v1/inference.proto"), None
        with self.assertRaises(grpc.RpcError) as caught:
            for m in call:
                last = inference.GenerateEvent.FromString(m)
        return last, caught.exception

    def test_answers_that_the_drain_limit_cuts_tell_their_usage(self):
        with Daemon(limits={"drain_limit": "1s"}) as d:
            call = d.channel().unary_stream(GENERATE)(request(30000), timeout=60)
            next(call)
            d.process.send_signal(signal.SIGTERM)
            last, error = self.last_words(call)
            self.assertEqual(error.code(), grpc.StatusCode.UNAVAILABLE)
            self.assertEqual(last.finished.reason, 6)
            self.assertGreater(last.finished.usage.completion_tokens, 10)
            self.assertEqual(d.process.wait(20), 0, d.log)

    def test_a_device_fault_tells_the_usage_and_ends_the_daemon(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as script:
            script.write('{"fault_step": 1000, "tokens_per_second": 100}')
            script.flush()
            with Daemon(BUILD / "tests/fake_engine/deltad-fake", env={"DELTA_FAKE": script.name}) as d:
                calls = [d.channel().unary_stream(GENERATE)(request(30000), timeout=60) for _ in range(4)]
                for c in calls:
                    next(c)
                for last, error in map(self.last_words, calls):
                    self.assertEqual(error.code(), grpc.StatusCode.UNAVAILABLE)
                    self.assertEqual(last.finished.reason, 6)
                self.assertEqual(d.process.wait(20), 70, d.log)


if __name__ == "__main__":
    unittest.main(verbosity=1)
