"""The daemon on the demo model, as agents use it: a tool conversation over every door, many streams at
once, clients that die, hostile bytes."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
import grpc  # noqa: E402
import ttrpc  # noqa: E402

INFERENCE, SESSION, MODEL = (f"deltad/v1/{n}.proto" for n in ("inference", "session", "model"))
CHAT = "/deltad.v1.InferenceService/Chat"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Get the weather for a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "City name"}}, "required": ["city"]}}}]
with open(daemon.SOURCE / "tests/model/golden/demo.json") as f:
    PROMPT = next(p for p in json.load(f)["prompts"] if p["name"] == "tool-after")
ROLES = {"system": 1, "user": 2, "assistant": 3, "tool": 4}


def load_modules():
    """The message classes t, m and s of types, inference and session, for this file's helpers and its caller."""
    global t, m, s
    t = daemon.module("deltad/v1/types.proto")
    m, s = daemon.module(INFERENCE), daemon.module(SESSION)
    return t, m, s


class WithState(unittest.TestCase):
    """Tests of daemons on one state directory: start() begins one, the last is stopped at the end."""

    def setUp(self):
        self.state = pathlib.Path(tempfile.mkdtemp(prefix="deltad-state-"))
        self.d = None

    def tearDown(self):
        if self.d:
            self.d.stop()
        shutil.rmtree(self.state)

    def start(self, **more):
        self.d = daemon.Daemon(state={"directory": self.state}, **more)
        self.inference = self.d.stub(INFERENCE, "InferenceService")
        self.sessions = self.d.stub(SESSION, "SessionService")


def setUpModule():
    global d, inference, sessions, model
    load_modules()
    d = daemon.Daemon()
    inference, sessions = d.stub(INFERENCE, "InferenceService"), d.stub(SESSION, "SessionService")
    model = d.stub(MODEL, "ModelService")


def tearDownModule():
    d.stop()


def message(role, text, call_id=""):
    return t.Message(role=ROLES[role], parts=[t.Part(text=text)], tool_call_id=call_id)


def request(messages, tools=(), temperature=0.0, seed=1, max_tokens=200, think=False, **more):
    return m.ChatRequest(messages=messages, tools=[t.Tool(openai_json=json.dumps(x)) for x in tools],
                         reasoning=t.Reasoning(mode=1 if think else 2),
                         sampling=t.Sampling(temperature=temperature, seed=seed),
                         stopping=t.Stopping(max_tokens=max_tokens), **more)


def gather(events):
    """Text, reasoning, complete calls and the Finished event; checks what all streams keep."""
    out = {"text": "", "reasoning": "", "calls": [], "args": {}}
    seq = 0
    for e in events:
        seq += 1
        assert e.seq == seq, (e.seq, seq)
        kind = e.WhichOneof("event")
        assert (seq == 1) == (kind == "accepted"), (seq, kind)
        assert "finished" not in out, "an event after Finished"
        if kind == "text":
            out["text"] += e.text.text
        elif kind == "reasoning":
            out["reasoning"] += e.reasoning.text
        elif kind == "call_args":
            out["args"][e.call_args.index] = out["args"].get(e.call_args.index, "") + e.call_args.json
        elif kind == "call_end":
            assert e.call_end.arguments_json == out["args"].get(e.call_end.index, "")
            out["calls"].append(e.call_end)
        elif kind == "finished":
            out["finished"] = e.finished
        elif kind == "accepted":
            out["accepted"] = e.accepted
    assert "finished" in out, "no Finished"
    return out


def slots_used():
    return model.GetStats(daemon.module(MODEL).GetStatsRequest()).slots_used


def wait_slots(n, seconds=5):
    end = time.monotonic() + seconds
    while slots_used() != n:
        assert time.monotonic() < end, f"{slots_used()} slots used, expected {n}"
        time.sleep(0.01)


class ToolConversation(unittest.TestCase):
    HISTORY = PROMPT["messages"][:2]
    CALL = PROMPT["messages"][2]["tool_calls"][0]["function"]
    RESULT, ANSWER = PROMPT["messages"][3]["content"], PROMPT["messages"][4]["content"]

    def check_call(self, out):
        self.assertEqual([c.name for c in out["calls"]], [self.CALL["name"]])
        self.assertEqual(json.loads(out["calls"][0].arguments_json), self.CALL["arguments"])
        self.assertEqual(out["calls"][0].state, 1)
        self.assertEqual(out["finished"].reason, 2)
        self.assertGreaterEqual(len(out["calls"][0].id), 24)
        return out["calls"][0]

    def conversation(self, call):
        first = [message(x["role"], x["content"]) for x in self.HISTORY]
        out = gather(call(request(first, PROMPT["tools"])))
        c = self.check_call(out)
        said = t.Message(role=3, parts=[t.Part(text=out["text"])],
                         tool_calls=[t.ToolCall(id=c.id, name=c.name, arguments_json=c.arguments_json)])
        out = gather(call(request(first + [said, message("tool", self.RESULT, c.id)], PROMPT["tools"])))
        self.assertEqual(out["text"], self.ANSWER)
        self.assertEqual(out["finished"].reason, 1)

    def test_stateless_over_grpc(self):
        self.conversation(inference.Chat)

    def test_stateless_over_ttrpc(self):
        for path in (d.ttrpc, d.socket):  # the socket of gRPC takes ttrpc too
            with ttrpc.Client(str(path), timeout=60) as c:
                self.conversation(lambda q: (m.ChatEvent.FromString(b)
                                             for b in c.messages(c.start(CHAT, q.SerializeToString()))))

    def test_in_a_session_only_the_result_is_sent(self):
        session = sessions.CreateSession(s.CreateSessionRequest(
            tools=[t.Tool(openai_json=json.dumps(x)) for x in PROMPT["tools"]])).session
        first = [message(x["role"], x["content"]) for x in self.HISTORY]
        out = gather(inference.Chat(request(first, session_id=session.id)))
        c = self.check_call(out)
        out = gather(inference.Chat(request([message("tool", self.RESULT, c.id)], session_id=session.id)))
        self.assertEqual(out["text"], self.ANSWER)
        # what was computed before is not computed again
        usage = out["finished"].usage
        self.assertGreater(usage.cached_tokens, 500)
        self.assertLess(usage.prompt_tokens - usage.cached_tokens, 60)
        listed = sessions.ListSessions(s.ListSessionsRequest()).sessions
        self.assertIn(session.id, [x.id for x in listed])
        with self.assertRaises(grpc.RpcError) as e:
            gather(inference.Chat(request([message("user", "hi")], session_id=session.id, expect_generation=0)))
        self.assertEqual(e.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)
        sessions.CloseSession(s.CloseSessionRequest(session_id=session.id))
        with self.assertRaises(grpc.RpcError) as e:
            sessions.GetSession(s.GetSessionRequest(session_id=session.id))
        self.assertEqual(e.exception.code(), grpc.StatusCode.NOT_FOUND)
        wait_slots(0)

    def test_an_answer_in_other_words_is_the_one_that_was_sampled(self):
        """Its calls' ids tell: keys in another order, numbers respelled, reasoning left out, make no other prompt."""
        for think in (False, True):
            history = [message(x["role"], x["content"]) for x in self.HISTORY]
            q = request(history, PROMPT["tools"], think=think, include=[1])
            sampled, calls = [], []
            for e in inference.Chat(q):
                sampled += [x.token_id for x in e.tokens.tokens]
                if e.WhichOneof("event") == "call_end":
                    calls.append(e.call_end)
            self.assertTrue(calls)
            prompt = list(inference.RenderPrompt(m.RenderPromptRequest(chat=q)).ids)
            respelled = t.Message(role=3, parts=[t.Part(text="  ")], tool_calls=[
                t.ToolCall(id=c.id, name=c.name, arguments_json=json.dumps(dict(reversed(json.loads(c.arguments_json).items())),
                                                                            indent=3)) for c in calls])
            q.messages.extend([respelled, message("tool", self.RESULT, calls[0].id)])
            ids = list(inference.RenderPrompt(m.RenderPromptRequest(chat=q)).ids)
            self.assertEqual(ids[:len(prompt) + len(sampled)], prompt + sampled)
            # an id that was never given out: the parts are all there is
            q.messages[-2].tool_calls[0].id = "call_of_somebody_else"
            other = list(inference.RenderPrompt(m.RenderPromptRequest(chat=q)).ids)
            self.assertNotEqual(other, ids)

    def test_in_deltactl(self):
        folder = pathlib.Path(d.folder)
        (folder / "tools.json").write_text(json.dumps(PROMPT["tools"]))
        history = list(self.HISTORY)
        for step in range(2):
            (folder / "messages.json").write_text(json.dumps(history))
            r = subprocess.run([daemon.BUILD / "clients/deltactl", "--socket", d.socket, "chat", "--json", "--no-think",
                                "--temperature", "0", "--tools", folder / "tools.json", "--messages", folder / "messages.json"],
                               capture_output=True, text=True, timeout=60)
            self.assertEqual(r.returncode, 0, r.stderr)
            events = [json.loads(x) for x in r.stdout.splitlines()]
            if step == 0:
                end = next(e["call_end"] for e in events if "call_end" in e)
                self.assertEqual(json.loads(end["arguments_json"]), self.CALL["arguments"])
                history += [{"role": "assistant", "content": "", "tool_calls": [
                    {"id": end["id"], "function": {"name": end["name"], "arguments": end["arguments_json"]}}]},
                    {"role": "tool", "tool_call_id": end["id"], "content": self.RESULT}]
            else:
                self.assertEqual("".join(e.get("text", {}).get("text", "") for e in events), self.ANSWER)

    def test_thinking_is_a_channel_of_its_own(self):
        out = gather(inference.Chat(request([message("user", "What color is the sky?")], think=True)))
        self.assertTrue(out["reasoning"])
        self.assertNotIn("think>", out["reasoning"] + out["text"])
        self.assertIn("blue", out["text"])
        self.assertGreater(out["finished"].usage.reasoning_tokens, 0)


class Streams(unittest.TestCase):
    QUESTIONS = [f"What is the capital of {c}?" for c in ("japan", "france", "italy", "spain", "norway", "egypt", "peru", "chile")] + \
        ["hello, who are you?", "What color is the sky?", "tell me a story", "count to five",
         "how do you work?", "what can you do?", "good morning", "thank you"]

    def ask(self, i, **more):
        # half of them greedy, half seeded
        return request([message("user", self.QUESTIONS[i])], temperature=0.0 if i % 2 else 1.2, seed=100 + i,
                       max_tokens=60, think=i % 4 < 2, **more)

    def test_a_budget_closes_reasoning(self):
        def ask(**budget):
            r = request([message("user", "What color is the sky?")], temperature=0.0, think=True)
            r.reasoning.MergeFrom(t.Reasoning(**budget))
            return gather(inference.Chat(r))

        whole = ask()
        self.assertGreater(whole["finished"].usage.reasoning_tokens, 8)
        for budget in (0, 1, 5):
            out = ask(budget_tokens=budget)
            self.assertTrue(whole["reasoning"].startswith(out["reasoning"]), out)
            self.assertTrue(out["text"])
            self.assertLessEqual(out["finished"].usage.reasoning_tokens, budget + 2)  # a newline and </think>
        out = ask(budget_tokens=1000)
        self.assertEqual((out["reasoning"], out["text"]), (whole["reasoning"], whole["text"]))

    def test_sixteen_at_once_say_what_each_says_alone(self):
        alone = [gather(inference.Chat(self.ask(i))) for i in range(16)]
        together = [None] * 16

        def run(i):
            together[i] = gather(d.stub(INFERENCE, "InferenceService", d.channel()).Chat(self.ask(i)))
        threads = [threading.Thread(target=run, args=(i,)) for i in range(16)]
        for x in threads:
            x.start()
        for x in threads:
            x.join(120)
        for a, b in zip(alone, together):
            self.assertEqual((a["reasoning"], a["text"]), (b["reasoning"], b["text"]))
            self.assertEqual(a["finished"].usage.completion_tokens, b["finished"].usage.completion_tokens)
        wait_slots(0)

    def test_a_seed_that_was_drawn_is_told_and_repeats_the_answer(self):
        q = request([message("user", "tell me a story")], temperature=1.5, max_tokens=40)
        q.sampling.ClearField("seed")
        a = gather(inference.Chat(q))
        q.sampling.seed = a["finished"].seed
        b = gather(inference.Chat(q))
        self.assertEqual(a["text"], b["text"])

    def test_a_killed_client_frees_its_slot(self):
        q = request([message("user", "tell me a story")], max_tokens=100000, think=False)
        q.stopping.ignore_eos = True
        code = ("import sys,socket,time;s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);"
                "s.sendall(bytes.fromhex(sys.argv[2]));print(len(s.recv(10)),flush=True);time.sleep(60)")
        body = ttrpc.field(1, b"deltad.v1.InferenceService") + ttrpc.field(2, b"Chat") + ttrpc.field(3, q.SerializeToString())
        frame = ttrpc.HEADER.pack(len(body), 1, ttrpc.REQUEST, ttrpc.CLOSED) + body
        p = subprocess.Popen([sys.executable, "-c", code, d.ttrpc, frame.hex()], stdout=subprocess.PIPE)
        self.assertEqual(p.stdout.readline(), b"10\n")
        wait_slots(1)
        p.send_signal(signal.SIGKILL)
        p.wait()
        p.stdout.close()
        begin = time.monotonic()
        wait_slots(0, 1)
        print(f"# slot free {1000 * (time.monotonic() - begin):.0f} ms after the kill")

    def test_cancel_by_id_and_by_closing(self):
        q = request([message("user", "tell me a story")], max_tokens=100000, request_id="stop-me")
        q.stopping.ignore_eos = True
        stream = inference.Chat(q)
        next(stream)
        inference.Cancel(m.CancelRequest(request_id="stop-me"))
        last = [e for e in stream][-1]
        self.assertEqual(last.finished.reason, 5)
        stream = inference.Chat(q)
        next(stream)
        stream.cancel()
        wait_slots(0, 1)

    def test_a_deadline_ends_the_call(self):
        q = request([message("user", "tell me a story")], max_tokens=100000)
        q.stopping.ignore_eos = True
        with self.assertRaises(grpc.RpcError) as e:
            list(inference.Chat(q, timeout=0.5))
        self.assertEqual(e.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        wait_slots(0, 1)

    def test_stop_strings_and_limits(self):
        q = request([message("user", "What color is the sky?")])
        q.stopping.stop.append("scatters")
        out = gather(inference.Chat(q))
        self.assertEqual(out["text"].rstrip(), "The sky is blue because air")
        self.assertEqual(out["finished"].matched_stop, "scatters")
        out = gather(inference.Chat(request([message("user", "What color is the sky?")], max_tokens=3)))
        self.assertEqual(out["finished"].reason, 3)
        self.assertEqual(out["finished"].usage.completion_tokens, 3)


class Hostile(unittest.TestCase):
    def code_of(self, method, data):
        call = d.channel().unary_unary(method)
        try:
            call(data, timeout=20)
        except grpc.RpcError as e:
            return e.code()
        return grpc.StatusCode.OK

    def test_malformed_requests_are_invalid_arguments(self):
        good = request([message("user", "hi")]).SerializeToString()
        bad_utf8 = ttrpc.field(1, b"\xff\xfe")
        deep = b""
        for _ in range(2000):
            deep = ttrpc.field(5, deep)
        for data in (b"\xff" * 50, bad_utf8, ttrpc.field(1, b"a\0b"), deep, good[:-3], ttrpc.varint(5 << 3 | 2) + b"\xff" * 9 + b"\x01",
                     ttrpc.field(5, b"") * 100000):
            self.assertEqual(self.code_of("/deltad.v1.InferenceService/RenderPrompt", ttrpc.field(1, data)),
                             grpc.StatusCode.INVALID_ARGUMENT, data[:20])
        self.assertEqual(self.code_of("/deltad.v1.InferenceService/Nothing", b""), grpc.StatusCode.UNIMPLEMENTED)

    def test_bad_fields_are_named(self):
        for q, field in ((request([message("user", "hi")], temperature=-1.0), "sampling.temperature"),
                         (request([message("user", "hi")], max_tokens=0), "stopping.max_tokens"),
                         (request([]), "messages")):
            with self.assertRaises(grpc.RpcError) as e:
                list(inference.Chat(q))
            self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            self.assertIn(field.split(".")[-1], e.exception.details())
            details = dict(e.exception.trailing_metadata()).get("grpc-status-details-bin")
            self.assertIn(b"google.rpc.ErrorInfo", details)

    def test_later_features_are_refused_by_name(self):
        q = request([message("user", "hi")])
        q.n = 2
        with self.assertRaises(grpc.RpcError) as e:
            list(inference.Chat(q))
        self.assertEqual(e.exception.code(), grpc.StatusCode.UNIMPLEMENTED)
        self.assertRegex(e.exception.details(), r"\bn\b")

    def test_too_long_a_prompt_says_the_limit(self):
        with self.assertRaises(grpc.RpcError) as e:
            list(inference.Chat(request([message("user", "word " * 200000)])))
        self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn(b"CONTEXT_LENGTH", dict(e.exception.trailing_metadata())["grpc-status-details-bin"])


class Text(unittest.TestCase):
    def test_tokenize_and_back(self):
        for text in ("Hello, world!", "<think>x</think>", "中文 é\u0301 \U0001f600", ""):
            ids = inference.Tokenize(m.TokenizeRequest(text=text)).ids
            import unicodedata
            self.assertEqual(inference.Detokenize(m.DetokenizeRequest(ids=ids)).text, unicodedata.normalize("NFC", text))

    def test_render_is_the_golden_prompt(self):
        q = request([message(x["role"], x["content"]) for x in PROMPT["messages"][:2]], PROMPT["tools"])
        text = inference.RenderPrompt(m.RenderPromptRequest(chat=q)).text
        self.assertTrue(PROMPT["prompt"].startswith(text[:-len("<think>\n\n</think>\n\n")]))

    def test_parse_output(self):
        r = inference.ParseOutput(m.ParseOutputRequest(
            chunks=[b"so</think>\n\nok\n\n<tool_call>\n<function=get_weather>\n<parameter=ci", b"ty>\nRome\n</parameter>\n</function>\n</tool_call>"],
            tools=[t.Tool(openai_json=json.dumps(TOOLS[0]))], thinking=True))
        self.assertEqual((r.reasoning, r.content, r.reason), ("so", "ok", 2))
        self.assertEqual(json.loads(r.calls[0].arguments_json), {"city": "Rome"})

    def test_generate(self):
        q = m.GenerateRequest(text="The sky is blue because", sampling=t.Sampling(temperature=0), stopping=t.Stopping(max_tokens=8))
        events = list(inference.Generate(q))
        self.assertEqual(events[0].WhichOneof("event"), "accepted")
        self.assertEqual(events[-1].finished.usage.completion_tokens, 8)
        self.assertTrue("".join(e.text.text for e in events if e.WhichOneof("event") == "text"))


if __name__ == "__main__":
    unittest.main()
