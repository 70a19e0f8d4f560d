"""The Python client against the daemon on the demo model."""
import pathlib
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "clients/python")]
import daemon  # noqa: E402
import deltad  # noqa: E402


class PythonClient(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.d = daemon.Daemon()
        cls.c = deltad.Client(cls.d.address)

    @classmethod
    def tearDownClass(cls):
        cls.c.close()
        cls.d.stop()

    def test_events_and_reply(self):
        ask = dict(thinking=True, temperature=0, max_tokens=100)
        events = list(self.c.chat([{"role": "user", "content": "What color is the sky?"}], **ask))
        self.assertIsInstance(events[0], deltad.Accepted)
        self.assertIsInstance(events[-1], deltad.Finished)
        reply = self.c.ask("What color is the sky?", **ask)
        self.assertEqual(reply.text, "".join(e.text for e in events if isinstance(e, deltad.Text)))
        self.assertIn("blue", reply.text)
        self.assertTrue(reply.reasoning)
        self.assertEqual(reply.finished.reason, "stop")

    def test_tool_loop_example(self):
        r = subprocess.run([sys.executable, ROOT / "clients/python/examples/tool_loop.py", self.d.address], capture_output=True,
                           text=True, timeout=60, env={"PYTHONPATH": str(ROOT / "clients/python")})
        self.assertEqual(r.returncode, 0, r.stderr)
        call, *answer = r.stdout.splitlines()
        self.assertTrue(call.startswith("-> get_weather("), r.stdout)
        self.assertIn("Paris", call)
        self.assertTrue(answer, r.stdout)

    def test_sessions_cancel_and_errors(self):
        with self.c.session() as s:
            s.append([{"role": "user", "content": "hello"}])
            self.assertEqual(self.c.stats().sessions_open, 1)
        with self.assertRaises(deltad.DeltadError) as e:
            s.ask("hi")
        self.assertEqual((e.exception.code, e.exception.reason), ("NOT_FOUND", "SESSION_UNKNOWN"))
        with self.assertRaises(deltad.DeltadError) as e:
            self.c.ask("hi", temperature=-1)
        self.assertEqual(e.exception.fields, ["sampling.temperature"])
        stream = self.c.chat([{"role": "user", "content": "tell me a story"}], request_id="x", max_tokens=30000)
        next(stream)
        stream.close()
        self.d.wait_until(lambda: self.c.stats().slots_used == 0)

    def test_text(self):
        self.assertEqual(self.c.detokenize(self.c.tokenize("héllo <think>")), "héllo <think>")
        self.assertEqual(self.c.model_info().backend, "cpu")
        events = list(self.c.generate("The sky is", max_tokens=4, temperature=0))
        self.assertEqual(events[-1].completion_tokens, 4)


if __name__ == "__main__":
    unittest.main()
