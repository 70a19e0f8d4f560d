"""replay without a daemon: transcripts, the generator's statistics, the accounting, and a server that speaks as OpenAI's."""
import http.server
import io
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import account  # noqa: E402
import generate  # noqa: E402
import player  # noqa: E402
import targets  # noqa: E402
import transcript  # noqa: E402

SMALL = {"scale": 1 / 32, "max_context": 6000, "turns": 20, "conversations": 4}


def text_of(**options):
    out = io.StringIO()
    generate.write(generate.Options(**options), out)
    return out.getvalue()


class Generator(unittest.TestCase):
    def test_the_seed_decides(self):
        self.assertEqual(text_of(seed=3, **SMALL), text_of(seed=3, **SMALL))
        self.assertNotEqual(text_of(seed=3, **SMALL), text_of(seed=4, **SMALL))
        # of a conversation nothing depends on the others
        more = text_of(seed=3, **{**SMALL, "conversations": 6})
        self.assertTrue(more.startswith(text_of(seed=3, **SMALL)))

    def test_transcripts_are_well_formed(self):
        for options in ({}, {"answers": "live"}, {"thinking": "mixed"}, {"thinking": "off"}, {"loop": 1}, {"own_system": True}):
            conversations = transcript.read(text_of(**SMALL, **options).splitlines())
            self.assertEqual([len(c.turns) for c in conversations], [20] * 4)
            for c in conversations:
                self.assertEqual(c.turns[0].messages[0]["role"], "user")
                self.assertTrue(c.tools)
                if options.get("thinking") == "off":
                    self.assertFalse(any(t.thinking for t in c.turns))
            heads = {json.dumps(c.tools) + c.system.rsplit("\n", 1)[0] for c in conversations}
            self.assertEqual(len(heads), 4 if options.get("own_system") else 1)

    def test_medians_follow_the_distribution(self):
        rng, o, n = random.Random(1), generate.Options(max_context=1 << 30), 20000
        drawn = [generate.draw_median(rng, o, o.system_tokens) for _ in range(n)]
        whole = sum(w for _, _, w in generate.CONTEXT)
        for low, high, weight in generate.CONTEXT:
            part = sum(low <= x < high for x in drawn) / n
            self.assertLess(abs(part - weight / whole), 0.015, (low, part))
        # cut where the longest prompt would not fit, with the weights of what is left as they were
        o = generate.Options(max_context=262144)
        drawn = [generate.draw_median(rng, o, o.system_tokens) for _ in range(n)]
        self.assertLessEqual(max(drawn), (262144 + o.system_tokens) / 2)
        self.assertLess(abs(sum(x < 65536 for x in drawn) / n - 12 / (12 + 27 + 30 * 0.118)), 0.015)

    def test_what_is_too_large_is_refused(self):
        with self.assertRaises(ValueError) as e:
            text_of(max_context=20000)
        self.assertIn("raise --max-context", str(e.exception))

    def test_lengths(self):
        o = generate.Options(seed=5, scale=1 / 16, max_context=16384, turns=60, conversations=12)
        conversations = transcript.read(text_of(**vars(o)).splitlines())
        tokens = lambda text: len(text.encode()) / o.bytes_per_token
        message = lambda m: tokens(m["content"]) / (generate.LISTING if m["role"] == "tool" else 1)
        answers, loops, medians, last = [], 0, [], []
        for c in conversations:
            head = generate.TEMPLATE_TOKENS + tokens(c.system) + sum(
                generate.tool_tokens(t, o.bytes_per_token) for t in c.tools)
            self.assertLess(abs(head / (o.system_tokens * o.scale) - 1), 0.1)
            size, prompts = head, []
            for t in c.turns:
                size += sum(message(m) for m in t.messages)
                loops += t.messages[0]["role"] == "user"
                prompts.append(size)
                size += t.max_tokens
                answers.append(t.max_tokens)
            medians.append(prompts[30])
            last.append(size)
        low, high = 32768 / 16, (16384 + head) / 2
        for m in medians:  # short messages have a least length, which can add up to some
            self.assertTrue(low * 0.85 <= m <= high * 1.25, (low, m, high))
        self.assertLessEqual(max(last), 16384 * 1.05)
        self.assertGreater(len({round(m) for m in medians}), 10)
        self.assertLess(abs(statistics.median(answers) - o.answer_tokens * o.scale), 3)
        self.assertTrue(12 * 60 / 12 * 0.6 < loops < 12 * 60 / 12 * 1.6 + 12, loops)
        adds = [sum(message(m) for m in t.messages) for c in conversations for t in c.turns]
        self.assertGreater(max(adds), 8 * statistics.median(adds))  # a few are long


class Transcripts(unittest.TestCase):
    HEAD = '{"conversation":"a"}'
    USER = '{"user":"hi"}'

    def test_calls_get_ids_and_results_answer_them_in_order(self):
        c, = transcript.read([self.HEAD, self.USER, '{"assistant":{"tool_calls":[{"name":"f","arguments":{"x":1}},{"name":"g"}]}}',
                              '{"tool":"1"}', '{"tool":"2"}', '{"assistant":"live","max_tokens":7,"thinking":false}'])
        ids = [k["id"] for k in c.turns[0].answer["tool_calls"]]
        self.assertEqual([m["tool_call_id"] for m in c.turns[1].messages], ids)
        self.assertEqual((c.turns[1].answer, c.turns[1].max_tokens, c.turns[1].thinking, c.turns[0].thinking), ("live", 7, False, True))

    def test_errors_name_the_line(self):
        for lines, told in (([self.USER], "t:1: the first line"), ([self.HEAD, "{"], "t:2: no JSON"),
                            ([self.HEAD, '{"user":"a","tool":"b"}'], "t:2: a line has exactly one"),
                            ([self.HEAD, '{"assistant":"live"}'], "t:2: an answer to nothing"),
                            ([self.HEAD, self.USER], "add an assistant line"), ([self.HEAD], "without turns"),
                            ([self.HEAD, self.USER, '{"assistant":"live","temperature":1}'], "t:3: unknown key ['temperature']"),
                            ([self.HEAD, self.USER, '{"assistant":{"content":"x"}}', '{"tool":"y"}'], "t:4: a tool result that no call"),
                            ([self.HEAD, self.USER, '{"assistant":"dead"}'], 't:3: "assistant" is'),
                            ([self.HEAD, self.USER, '{"assistant":"live"}', self.HEAD], "t:4: \"conversation\" is a name")):
            with self.assertRaises(transcript.Malformed) as e:
                transcript.read(lines, "t")
            self.assertIn(told, str(e.exception))

    def test_results_meet_the_calls_of_a_live_answer(self):
        tool = lambda text, *id_: {"role": "tool", "content": text, **({"tool_call_id": id_[0]} if id_ else {})}
        user = lambda text: {"role": "user", "content": text}
        f = transcript.for_calls
        self.assertEqual(f([tool("1")], ["a"]), [tool("1", "a")])
        self.assertEqual(f([tool("1")], ["a", "b"]), [tool("1", "a"), tool("1", "b")])
        self.assertEqual(f([tool("1"), tool("2")], ["a"]), [tool("1", "a")])
        self.assertEqual(f([tool("1")], []), [user("1")])
        self.assertEqual(f([user("1")], ["a"]), [tool("ok", "a"), user("1")])
        self.assertEqual(f([user("1")], []), [user("1")])


class Accounting(unittest.TestCase):
    def count(self, prompt, cached, before=None, counted=None):
        s = account.Sample("c", 1, prompt=prompt, cached=cached, counted=counted)
        account.count(s, before)
        return s.new, s.reprocessed

    def test_new_and_reprocessed(self):
        before = account.Sample("c", 0, prompt=1000, completion=51)
        self.assertEqual(self.count(500, 100), (500, 0))                    # a first turn is all new
        self.assertEqual(self.count(1080, 1050, before), (30, 0))           # all that was there is found
        self.assertEqual(self.count(1080, 1000, before), (30, 50))          # the answer is computed again
        self.assertEqual(self.count(1080, 0, before), (30, 1050))           # nothing is found
        self.assertEqual(self.count(1080, 1070, before), (30, 0))           # more than the old part is found
        self.assertEqual(self.count(1030, 1000, before), (0, 30))           # reasoning went: the difference says too little
        self.assertEqual(self.count(1030, 1000, before, counted=20), (20, 10))
        self.assertEqual(self.count(10, 0, before, counted=20), (10, 0))    # never more than the prompt
        recorded = account.Sample("c", 0, prompt=1000, completion=51, answer_stays=False)
        self.assertEqual(self.count(1080, 960, recorded), (80, 40))

    def test_percentiles(self):
        self.assertIsNone(account.percentile([], 50))
        self.assertEqual([account.percentile([7], p) for p in (0, 50, 99, 100)], [7] * 4)
        self.assertEqual([account.percentile(range(1, 101), p) for p in (0, 1, 50, 99, 100)], [1, 1, 50, 99, 100])

    def test_summary(self):
        samples = [account.Sample("a", 0, 100, 0, 10, new=100, first_s=.5, arrivals_s=[.5, .6, .8], note="n"),
                   account.Sample("a", 1, 200, 90, 5, new=90, reprocessed=20, first_s=.1, arrivals_s=[.1, .2], note="from 17 on"),
                   account.Sample("b", 0, error="b, turn 0: no")]
        a = account.summary(samples, 2)
        self.assertEqual((a["prompt_tokens"], a["cached_tokens"], a["new_tokens"], a["reprocessed_tokens"]), (300, 90, 190, 20))
        self.assertAlmostEqual(a["reprocessed_percent"], 100 * 20 / 300)
        self.assertEqual((a["turns"], a["failed"], a["cold_first_token"]["p50_s"], a["warm_first_token"]["p99_s"]), (2, 1, .5, .1))
        self.assertAlmostEqual(a["longest_gap"]["max_s"], .2)
        self.assertEqual((a["gap"]["n"], a["output_tokens_per_s"]), (3, 7.5))
        self.assertEqual(a["reprocessed_by_note"], {"from N on": {"turns": 1, "tokens": 20}})
        text = account.report(a)
        self.assertIn("1 failed", text)
        self.assertIn("error: b, turn 0: no", text)
        account.report(account.summary(samples[2:], 1))  # nothing but failures has a report too

    def test_gaps_between_two_times(self):
        self.assertEqual(player.gaps([0, 1, 3, 4], 1.5, 2), [2])
        self.assertEqual(player.gaps([0, 1, 3, 4], 0.5, 3.5), [1, 2, 1])
        self.assertEqual(player.gaps([0, 1], 5, 6), [])


class FakeServer(http.server.BaseHTTPRequestHandler):
    """Caches the text of the longest prompt that it saw; a token is a letter of a message's content."""
    protocol_version = "HTTP/1.1"
    seen = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(b'{"data":[{"id":"fake"}]}', "application/json")

    def answer(self, body, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        q = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = "".join(m.get("content") or "" for m in q["messages"])
        if "refuse" in prompt:
            return self.answer(b'{"error":{"message":"too long"}}', "application/json", 400)
        cached = max([len(s) for s in self.seen if prompt.startswith(s)], default=0)
        self.seen.append(prompt)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def send(x):
            data = b"data: " + (x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        delta = lambda **d: send({"choices": [{"index": 0, "delta": d}]})
        delta(role="assistant", content="")
        time.sleep(0.02)
        delta(reasoning_content="so")
        if q.get("tools"):
            delta(tool_calls=[{"index": 0, "id": "id1", "function": {"name": "f", "arguments": ""}}])
            delta(tool_calls=[{"index": 0, "function": {"arguments": '{"x":'}}])
            delta(tool_calls=[{"index": 0, "function": {"arguments": "1}"}}])
        else:
            delta(content="abc")
        send({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if q.get("tools") else "stop"}]})
        last = {"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": 4}}
        if "llama" in prompt:
            last["timings"] = {"cache_n": cached}
        elif "untold" not in prompt:
            last["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
        send(last)
        send(b"[DONE]")
        self.wfile.write(b"0\r\n\r\n")


class OpenAI(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
        cls.server.daemon_threads = True
        threading.Thread(target=cls.server.serve_forever, daemon=True).start()
        cls.url = f"http://127.0.0.1:{cls.server.server_port}"

    @classmethod
    def tearDownClass(cls):
        cls.server.shutdown()
        cls.server.server_close()

    def test_an_answer(self):
        t = targets.OpenAI(self.url)
        self.assertEqual(t.describe()["model"], "fake")
        a = t.ask([{"role": "user", "content": "one"}], [{"type": "function", "function": {"name": "f"}}], True, 5)
        self.assertEqual((a.prompt, a.cached, a.completion, a.reason), (3, 0, 4, "tool_calls"))
        self.assertEqual(a.message["tool_calls"], [{"id": "id1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}])
        self.assertEqual((len(a.arrivals_s), a.message["reasoning_content"]), (4, "so"))
        self.assertGreater(a.arrivals_s[0], 0.015)  # not at the piece that says the role
        b = t.ask([{"role": "user", "content": "one more"}], [], True, 5)
        self.assertEqual((b.prompt, b.cached, b.message["content"]), (8, 3, "abc"))
        ask = lambda text: t.ask([{"role": "user", "content": text}], [], True, 5)
        self.assertEqual([ask("llama").cached, ask("llama 2").cached, ask("untold").cached], [0, 5, 0])
        self.assertIn("does not tell", ask("untold").note)
        t.close()

    def test_a_run_and_its_errors(self):
        with tempfile.TemporaryDirectory() as folder:
            path, out = pathlib.Path(folder) / "t.jsonl", pathlib.Path(folder) / "out.json"
            path.write_text('{"conversation":"x","system":"s"}\n{"user":"12345"}\n{"assistant":"live"}\n{"user":"678"}\n{"assistant":"live"}\n'
                            '{"conversation":"y"}\n{"user":"please refuse"}\n{"assistant":"live"}\n')
            run = lambda *more: subprocess.run([sys.executable, "-B", HERE / "replay", "run", path, "--openai", *more], capture_output=True,
                                               text=True, timeout=60)
            r = run(self.url, "--json", out, "--concurrency", "2")
            self.assertEqual(r.returncode, 1, r.stderr)
            self.assertIn("error: y, turn 0: HTTP 400: {\"error\":{\"message\":\"too long\"}}", r.stdout)
            figures = json.loads(out.read_text())
            second = figures["turns"][1]
            # "s12345" + "abc" + "678", of which the first was seen, the last of the answer's 4 tokens not computed
            self.assertEqual((second["prompt"], second["cached"], second["new"], second["reprocessed"]), (12, 6, 3, 3))
            r = run("http://127.0.0.1:1")
            self.assertEqual(r.returncode, 2)
            self.assertIn("is a server running there?", r.stderr)
            r = run(self.url, "--mode", "session")
            self.assertEqual(r.returncode, 2)
            path.write_text("{}\n")
            self.assertIn("t.jsonl:1: a line has exactly one", run(self.url).stderr)


if __name__ == "__main__":
    unittest.main()
