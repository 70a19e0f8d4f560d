"""The Python client against the daemon on the demo model."""
import asyncio
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import types as py_types
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "clients/python")]
import daemon  # noqa: E402
import deltad  # noqa: E402
from deltad import _requests as requests, types  # noqa: E402

WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather for a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "City name"}}, "required": ["city"]}}}
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"


class Requests(unittest.TestCase):
    """What goes out, without a daemon."""

    def test_stop_is_one_text_or_many(self):
        self.assertEqual(list(requests.chat("x", stop="END").stopping.stop), ["END"])
        self.assertEqual(list(requests.generate("x", stop=["a", "b"]).stopping.stop), ["a", "b"])

    def test_every_option_lands_in_its_field(self):
        q = requests.chat("hi", tools=[WEATHER], thinking=False, budget_tokens=0, preserve_thinking=False, parallel_tool_calls=False,
                          temperature=0, top_k=3, seed=0, logit_bias={7: 1.5}, max_tokens=5, min_tokens=0, logprobs=True,
                          top_logprobs=2, include_prefill=True, priority="high", max_wall_time=1.5, tool_choice="required",
                          response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}})
        self.assertEqual((q.reasoning.mode, q.reasoning.WhichOneof("budget_tokens_opt"), q.reasoning.preserve), (2, "budget_tokens", False))
        self.assertEqual(q.WhichOneof("parallel_tool_calls_opt"), "parallel_tool_calls")
        self.assertEqual(q.sampling.WhichOneof("temperature_opt"), "temperature")
        self.assertEqual(q.sampling.WhichOneof("seed_opt"), "seed")
        self.assertEqual((q.sampling.logit_bias[0].token_id, q.logprobs.top, list(q.include)), (7, 2, [2]))
        self.assertEqual((q.scheduling.priority, q.scheduling.max_wall_time_ns, q.tool_choice.mode), (3, 1500000000, 3))
        self.assertEqual(json.loads(q.format.json_schema), {"type": "object"})
        named = requests.chat("hi", tool_choice={"type": "function", "function": {"name": "f"}}).tool_choice
        self.assertEqual(named.name, "f")
        allowed = requests.chat("hi", tool_choice={"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}}).tool_choice.allowed
        self.assertEqual((allowed.mode, list(allowed.names)), (3, ["f"]))
        self.assertEqual(list(requests.chat("x", response_format={"choice": ["a", "b"]}).format.choice.choices), ["a", "b"])

    def test_bad_input_says_what_and_where(self):
        for messages, told in (([{"role": "robot", "content": "x"}], "messages[0].role: 'robot'"),
                               ([{"content": "x"}], "messages[0].role: None"),
                               ([{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
                                "messages[1].content[0]: a part of type image_url"),
                               ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls[0]: there is no name")):
            with self.assertRaises(ValueError) as e:
                requests.chat(messages)
            self.assertIn(told, str(e.exception))
        for options in ({"tool_choice": "maybe"}, {"response_format": {"yaml": 1}}, {"priority": "urgent"}):
            with self.assertRaises(ValueError):
                requests.chat("x", **options)
        with self.assertRaises(TypeError) as e:
            requests.chat("x", temprature=1)
        self.assertIn("temprature", str(e.exception))

    def test_what_a_newer_daemon_sends_is_no_error(self):
        event = deltad.message("deltad.v1.ChatEvent")
        self.assertEqual(list(types.events_of(event(seq=3))), [])  # a kind that is not known here
        e = event(seq=4)
        e.finished.reason = 77
        self.assertEqual([x.reason for x in types.events_of(e)], ["unknown"])

    def test_an_error_of_the_block_is_not_hidden_by_the_close(self):
        c = deltad.Client("unix:///nowhere")
        c.create_session = lambda **_: py_types.SimpleNamespace(close=lambda: 1 / 0)
        with self.assertRaises(KeyError):
            with c.session():
                raise KeyError("mine")
        with self.assertRaises(ZeroDivisionError):
            with c.session():
                pass

    def test_nobody_there(self):
        c = deltad.Client("unix:///nowhere", timeout=5)
        self.assertFalse(c.is_ready())
        with self.assertRaises(deltad.DeltadError) as e:
            c.stats()
        self.assertEqual(e.exception.code, "UNAVAILABLE")


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


    def test_tokens_and_log_probabilities(self):
        reply = self.c.ask("hello", thinking=False, temperature=0, max_tokens=5, top_logprobs=3)
        self.assertEqual(len(reply.tokens), reply.finished.completion_tokens)
        for t in reply.tokens:
            self.assertEqual(len(t.top), 3)
            self.assertTrue(math.isclose(t.logprob, t.top[0][2]), t)
        plain = self.c.ask("hello", thinking=False, temperature=0, max_tokens=5, include_tokens=True)
        self.assertEqual([t.id for t in plain.tokens], [t.id for t in reply.tokens])
        self.assertIsNone(plain.tokens[0].logprob)

    def test_render_parse_and_ids(self):
        text, ids = self.c.render("hello", thinking=False)
        self.assertIn("<|im_start|>user\nhello<|im_end|>", text)
        self.assertEqual(self.c.tokenize(text), ids)
        by_ids = [e for e in self.c.generate(ids, max_tokens=5, temperature=0) if isinstance(e, deltad.Text)]
        asked = self.c.ask("hello", thinking=False, max_tokens=5, temperature=0)
        self.assertEqual("".join(e.text for e in by_ids), asked.text)
        reply = self.c.parse(["so\n</think>\n\n", CALL], tools=[WEATHER])
        self.assertEqual((reply.reasoning, reply.tool_calls[0].arguments, reply.reason), ("so", {"city": "Rome"}, "tool_calls"))
        self.assertEqual(self.c.parse(CALL, tools=[WEATHER], thinking=False, tool_choice="none").text, CALL)

    def test_sessions_are_seen(self):
        with self.c.session(name="mine", idle_timeout=60) as s:
            seen = [x for x in self.c.sessions() if x.id == s.id]
            self.assertEqual([(x.name, x.idle_timeout_ns) for x in seen], [("mine", 60000000000)])
            s.ask("hello", max_tokens=4, thinking=False)
            got = s.get(with_messages=True)
            self.assertEqual((got.session.generation, len(got.messages)), (1, 2))
            with self.assertRaises(deltad.DeltadError) as e:
                s.ask("again", expect_generation=0)
            self.assertEqual((e.exception.reason, e.exception.metadata), ("GENERATION", {"actual": "1", "expected": "0"}))
            reply = s.ask("again", expect_generation=1, max_tokens=4, thinking=False)
            self.assertGreater(reply.finished.cached_tokens, 0)
        self.assertNotIn(s.id, [x.id for x in self.c.sessions()])

    def test_branches_and_the_way_back(self):
        with self.c.session(messages=[{"role": "user", "content": "hello " * 100}]) as s:
            first = s.ask("how are you?", max_tokens=8, thinking=False, temperature=0).text
            a, b = s.fork(count=2, name="branch")
            self.assertEqual(a.ask("and now?", max_tokens=8, thinking=False, temperature=0).text, b.ask("and now?", max_tokens=8, thinking=False, temperature=0).text)
            self.assertEqual(s.rewind(1).n_messages, 1)
            again = s.ask("how are you?", max_tokens=8, thinking=False, temperature=0)
            self.assertEqual(again.text, first)
            self.assertGreater(again.finished.cached_tokens, 0)
            a.close(), b.close()
        self.assertEqual(self.c.ask("hello", max_tokens=4, cache_bypass=True).finished.cached_tokens, 0)

    def test_an_answer_outlives_its_call(self):
        events = self.c.chat("tell me a story", detach=True, max_tokens=40)
        i = next(events).request_id
        events.close()
        reply = deltad.Reply()
        for e in self.c.resume(i):
            reply.add(e)
        self.assertEqual(reply.finished.completion_tokens, 40)
        one, two = (self.c.ask("hello", idempotency_key="k", max_tokens=5, temperature=1.0) for _ in range(2))
        self.assertEqual(one.finished, two.finished)

    def test_cancel_from_another_thread(self):
        events = self.c.chat("tell me a story", request_id="story", max_tokens=30000, ignore_eos=True)
        next(events)
        threading.Timer(0.2, self.c.cancel, ["story"]).start()
        last = list(events)[-1]
        self.assertEqual(last.reason, "cancelled")
        self.assertLess(last.completion_tokens, 30000)

    def test_a_deadline(self):
        with self.assertRaises(deltad.DeltadError) as e:
            self.c.ask("tell me a story", max_tokens=30000, ignore_eos=True, timeout=0.3)
        self.assertEqual(e.exception.code, "DEADLINE_EXCEEDED")
        self.assertEqual(self.c.ask("tell me a story", max_tokens=30000, ignore_eos=True, max_wall_time=0.3).finished.reason, "time")

    def test_full_says_when_to_come_back(self):
        with daemon.Daemon(limits={"max_requests_per_uid": 1}) as d:
            with deltad.Client(d.address) as c:
                self.assertTrue(c.is_ready())
                events = c.chat("tell me a story", max_tokens=30000, ignore_eos=True)
                next(events)
                with self.assertRaises(deltad.DeltadError) as e:
                    c.ask("hi")
                self.assertEqual((e.exception.code, e.exception.reason), ("RESOURCE_EXHAUSTED", "USER_LIMIT"))
                self.assertGreater(e.exception.retry_after, 0)
                events.close()

    def test_asyncio(self):
        async def main():
            async with deltad.AsyncClient(self.d.address) as c:
                one, two = await asyncio.gather(c.ask("What color is the sky?", thinking=False, temperature=0),
                                                c.ask("hello", thinking=False, temperature=0))
                self.assertIn("blue", one.text)
                self.assertTrue(two.finished)
                async for e in c.chat("tell me a story", max_tokens=30000, ignore_eos=True):
                    if isinstance(e, deltad.Text):
                        break
                with self.assertRaises(deltad.DeltadError) as failed:
                    await c.ask("x", temperature=-1)
                self.assertEqual(failed.exception.fields, ["sampling.temperature"])
                task = asyncio.ensure_future(c.ask("tell me a story", max_tokens=30000, ignore_eos=True))
                await asyncio.sleep(0.2)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task

        asyncio.run(main())
        self.d.wait_until(lambda: self.c.stats().slots_used == 0)

    def test_the_installed_package(self):
        """pip install of a copy of the checkout's folders, into a folder of its own; it speaks to the daemon."""
        with tempfile.TemporaryDirectory() as folder:
            r = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index",
                                "--target", folder, ROOT / "clients/python"], capture_output=True, text=True, timeout=300)
            if "No module named pip" in r.stderr:
                self.skipTest("there is no pip")
            self.assertEqual(r.returncode, 0, r.stderr)
            self.assertFalse((ROOT / "clients/python/deltad/deltad.desc").exists())
            code = f"import deltad; print(deltad.__file__); print(deltad.Client({self.d.address!r}).ask('hello', thinking=False).reason)"
            r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                               env={**os.environ, "PYTHONPATH": folder})
            self.assertEqual(r.returncode, 0, r.stderr)
            where, reason = r.stdout.split()
            self.assertTrue(where.startswith(folder), where)
            self.assertEqual(reason, "stop")


if __name__ == "__main__":
    unittest.main()
