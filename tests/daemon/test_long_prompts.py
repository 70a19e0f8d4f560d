"""Long texts are worked on beside the loop: others are served meanwhile, and a client that goes, a cancel, a
deadline or a stop in the middle of it leave nothing behind."""
import json
import pathlib
import signal
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
import grpc  # noqa: E402

INFERENCE, MODEL, SESSION = (f"deltad/v1/{n}.proto" for n in ("inference", "model", "session"))
TEXT = "The quick brown fox jumps over the lazy dog, 1234567 times in a row; so it is told.\n" * 60000  # 5 MB


def setUpModule():
    global d, m, t, inference, model
    d = daemon.Daemon()
    m, t = daemon.module(INFERENCE), daemon.module("deltad/v1/types.proto")
    inference, model = d.stub(INFERENCE, "InferenceService"), d.stub(MODEL, "ModelService")


def tearDownModule():
    d.stop()


def chat(text, **more):
    return m.ChatRequest(messages=[t.Message(role=2, parts=[t.Part(text=text)])], **more)


def stats():
    return model.GetStats(daemon.module(MODEL).GetStatsRequest(), timeout=20)


def wait_until_idle():
    d.wait_until(lambda: stats().requests_queued + stats().requests_running == 0)


class LongPrompts(unittest.TestCase):
    def slowest_answer_while(self, call):
        """Seconds that GetStats took at most while the call ran, and how long the call did."""
        answer = call()
        begin, slowest, n = time.monotonic(), 0.0, 0
        while not answer.done():
            at = time.monotonic()
            stats()
            slowest, n = max(slowest, time.monotonic() - at), n + 1
        return slowest, time.monotonic() - begin, n, answer

    def test_others_are_served_while_a_long_text_is_tokenised(self):
        slowest, took, n, answer = self.slowest_answer_while(
            lambda: inference.Tokenize.future(m.TokenizeRequest(text=TEXT), timeout=60))
        print(f"# {len(TEXT) >> 20} MB tokenised in {took:.2f} s; the slowest of {n} other answers took {slowest * 1e3:.0f} ms")
        self.assertGreater(len(answer.result().ids), 500000)
        self.assertGreater(n, 5)

    def test_a_prompt_of_megabytes_is_refused_without_a_stall(self):
        with self.assertRaises(grpc.RpcError) as e:
            list(inference.Chat(chat(TEXT), timeout=60))
        self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("leave no room", e.exception.details())
        wait_until_idle()

    def test_a_long_prompt_answers_like_a_short_one(self):
        rendered = inference.RenderPrompt(m.RenderPromptRequest(chat=chat(TEXT[:100000])), timeout=60)
        whole = inference.Tokenize(m.TokenizeRequest(text=rendered.text), timeout=60)
        self.assertEqual(list(rendered.ids), list(whole.ids))
        events = list(inference.Chat(chat("the " * 8500, sampling=t.Sampling(temperature=0),
                                          stopping=t.Stopping(max_tokens=3)), timeout=120))
        self.assertEqual(events[-1].finished.usage.completion_tokens, 3)
        self.assertGreater(events[-1].finished.usage.prompt_tokens, 5000)

    def test_who_goes_meanwhile_leaves_nothing(self):
        for _ in range(5):
            calls = [inference.Chat(chat(TEXT, request_id=f"gone-{i}"), timeout=60) for i in range(4)]
            texts = [inference.Tokenize.future(m.TokenizeRequest(text=TEXT), timeout=60) for _ in range(2)]
            time.sleep(0.05)
            for c in calls + texts:
                c.cancel()
        wait_until_idle()
        self.assertTrue(inference.Tokenize(m.TokenizeRequest(text="hi"), timeout=20).ids)

    def test_a_deadline_passes_meanwhile(self):
        with self.assertRaises(grpc.RpcError) as e:
            list(inference.Chat(chat(TEXT), timeout=0.05))
        self.assertEqual(e.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        wait_until_idle()

    def test_a_cancel_meanwhile(self):
        # short enough to run, long enough to be prepared on a worker
        got = []
        call = inference.Chat(chat(TEXT[:400000], request_id="slow"), timeout=60)

        def read():
            try:
                got.extend(call)
            except grpc.RpcError as e:
                got.append(e)

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(200):
            try:
                inference.Cancel(m.CancelRequest(request_id="slow"), timeout=20)
                break
            except grpc.RpcError as e:
                self.assertEqual(e.code(), grpc.StatusCode.NOT_FOUND)
                time.sleep(0.001)
        reader.join(60)
        self.assertFalse(reader.is_alive())
        wait_until_idle()

    def test_a_session_is_as_before_if_its_turn_never_ran(self):
        sessions, s = d.stub(SESSION, "SessionService"), daemon.module(SESSION)
        x = sessions.CreateSession(s.CreateSessionRequest(), timeout=20).session
        call = inference.Chat(chat(TEXT, session_id=x.id), timeout=60)
        time.sleep(0.02)
        with self.assertRaises(grpc.RpcError) as e:
            list(inference.Chat(chat("hello", session_id=x.id), timeout=60))
        self.assertEqual(e.exception.code(), grpc.StatusCode.ABORTED)
        call.cancel()
        wait_until_idle()
        events = list(inference.Chat(chat("hello", session_id=x.id, stopping=t.Stopping(max_tokens=2)), timeout=60))
        self.assertEqual(events[0].accepted.generation, 0)
        self.assertEqual(events[-1].finished.generation, 1)
        with self.assertRaises(grpc.RpcError):
            list(inference.Chat(chat(TEXT, session_id=x.id), timeout=60))
        sessions.CloseSession(s.CloseSessionRequest(session_id=x.id), timeout=20)


class Stream(unittest.TestCase):
    def test_a_stream_goes_on_while_long_texts_are_worked_on(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as script:
            json.dump({"tokens_per_second": 200, "reply": "x</think>\n\n" + "one two three " * 400}, script)
            script.flush()
            with daemon.Daemon(daemon.BUILD / "tests/fake_engine/deltad-fake", env={"DELTA_FAKE": script.name}) as fake:
                stub = fake.stub(INFERENCE, "InferenceService")
                times, got = [], threading.Event()

                def read():
                    for _ in stub.Chat(chat("Go on."), timeout=60):
                        times.append(time.monotonic())
                        if len(times) == 40:
                            got.set()

                reader = threading.Thread(target=read)
                reader.start()
                self.assertTrue(got.wait(20))
                begin = time.monotonic()
                # three in a row, each as long as may be taken by one worker
                other = fake.stub(INFERENCE, "InferenceService", fake.channel())
                for _ in range(3):
                    with self.assertRaises(grpc.RpcError):
                        list(other.Chat(chat(TEXT), timeout=60))
                took = time.monotonic() - begin
                fake.process.send_signal(signal.SIGTERM)
                reader.join(60)
                meanwhile = [t for t in times if begin <= t <= begin + took]
                gap = max((b - a for a, b in zip(meanwhile, meanwhile[1:])), default=took)
                print(f"# {len(meanwhile)} events in {took:.2f} s of long prompts, {gap * 1e3:.0f} ms apart at most")
                self.assertGreater(len(meanwhile), 10)
                self.assertLess(gap, took / 3)


class Stop(unittest.TestCase):
    def test_a_stop_meanwhile(self):
        with daemon.Daemon() as other:
            stub = other.stub(INFERENCE, "InferenceService")
            calls = [stub.Tokenize.future(m.TokenizeRequest(text=TEXT), timeout=60) for _ in range(3)]
            calls += [stub.RenderPrompt.future(m.RenderPromptRequest(chat=chat(TEXT)), timeout=60)]
            time.sleep(0.1)
            other.process.send_signal(signal.SIGTERM)
            self.assertEqual(other.process.wait(30), 0)
            for c in calls:
                c.exception()  # answered or refused, not lost


if __name__ == "__main__":
    unittest.main()
