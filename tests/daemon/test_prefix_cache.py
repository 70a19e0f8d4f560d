"""What was computed before is not computed again: prompts that come again, tool loops, other users' prompts,
sessions that had to make room; and the answers are those of a daemon that remembers nothing."""
import pathlib
import sys
import threading
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
import grpc  # noqa: E402
from test_end_to_end import MODEL, PROMPT, gather, message, request  # noqa: E402
import test_end_to_end as end_to_end  # noqa: E402

CHUNK = 64  # states are kept at multiples of that many tokens
WORDS = ("the quick brown fox jumps over a lazy dog while seven wizards quietly mix potions for "
         "an old king who never sleeps").split()


def setUpModule():
    global t, m, s
    t, m, s = end_to_end.load_modules()


def text(n, salt):
    return " ".join(WORDS[(i * 7 + i // 5 + salt) % len(WORDS)] for i in range(n))


class Cached(unittest.TestCase):
    settings = {}

    @classmethod
    def setUpClass(cls):
        cls.d = daemon.Daemon(**cls.settings)
        cls.inference = cls.d.stub(end_to_end.INFERENCE, "InferenceService")
        cls.sessions = cls.d.stub(end_to_end.SESSION, "SessionService")
        cls.model = cls.d.stub(MODEL, "ModelService")

    @classmethod
    def tearDownClass(cls):
        cls.d.stop()

    def chat(self, messages, *args, **more):
        return gather(self.inference.Chat(request(messages, *args, **more)))

    def cold(self, messages, *args, **more):
        return self.chat(messages, *args, cache=t.CacheControl(bypass=True), **more)

    def stats(self):
        return self.model.GetStats(daemon.module(MODEL).GetStatsRequest())


class Stateless(Cached):
    def test_a_prompt_that_comes_again(self):
        messages = [message("system", text(150, 1)), message("user", text(200, 2))]
        first = self.chat(messages, max_tokens=30)
        usage = first["finished"].usage
        self.assertEqual(usage.cached_tokens, 0)
        self.assertEqual(usage.cache_note, "nothing is kept that begins like this prompt")
        again = self.chat(messages, max_tokens=30)
        usage = again["finished"].usage
        self.assertGreater(usage.cached_tokens, usage.prompt_tokens - CHUNK - 16)
        self.assertEqual(again["text"], first["text"])
        cold = self.cold(messages, max_tokens=30)
        self.assertEqual(cold["finished"].usage.cached_tokens, 0)
        self.assertEqual(cold["finished"].usage.cache_note, "the request bypasses the cache")
        self.assertEqual(cold["text"], first["text"])
        # the same system text before another conversation
        other = self.chat([messages[0], message("user", text(20, 5))], max_tokens=5)["finished"].usage
        self.assertGreater(other.cached_tokens, 100)
        self.assertRegex(other.cache_note, r"new from token \d+ on, in messages\[1\]; the last state kept before")
        # a change in the middle says where
        changed = [message("system", text(100, 1) + " no " + text(49, 1)), messages[1]]
        usage = self.chat(changed, max_tokens=5)["finished"].usage
        self.assertRegex(usage.cache_note, r"in messages\[0\]")
        stats = self.stats()
        self.assertGreater(stats.cache.hits, 1)
        self.assertGreater(stats.cache.tokens_found, 500)
        self.assertGreater(stats.cache.checkpoints, 1)
        self.assertEqual(stats.pages_used, 0)
        self.assertGreater(stats.cache.pages, 5)

    def test_a_tool_loop_computes_only_what_is_new(self):
        for think in (False, True):
            history = [message("system", f"Be brief. {think}"), message("user", "What is the weather in Rome?")]
            before = 0
            for turn in range(5):
                out = self.chat(history, PROMPT["tools"], think=think, max_tokens=150, tool_choice=t.ToolChoice(mode=3))
                usage, calls = out["finished"].usage, out["calls"]
                if turn:
                    # all but the result, the template's markers, and the token sampled last
                    self.assertLess(usage.prompt_tokens - usage.cached_tokens, 45, (think, turn, usage))
                    self.assertGreaterEqual(usage.cached_tokens, before)
                self.assertEqual((len(calls), out["finished"].reason), (1, 2))
                before = usage.prompt_tokens
                history += [t.Message(role=3, tool_calls=[t.ToolCall(id=c.id, name=c.name, arguments_json=c.arguments_json)
                                                          for c in calls]),
                            message("tool", f"{20 + turn} degrees", calls[0].id)]
            cold = self.cold(history, PROMPT["tools"], think=think, max_tokens=40)
            warm = self.chat(history, PROMPT["tools"], think=think, max_tokens=40)
            self.assertEqual((cold["text"], cold["reasoning"]), (warm["text"], warm["reasoning"]))

    def test_the_next_user_message_strips_the_reasoning_and_is_warm_up_to_there(self):
        history = [message("system", text(60, 3)), message("user", text(150, 77))]
        out = self.chat(history, think=True, max_tokens=120)
        prompt = out["finished"].usage.prompt_tokens
        history += [t.Message(role=3, parts=[t.Part(text=out["text"] or "Yes.")]), message("user", "And now?")]
        usage = self.chat(history, think=True, max_tokens=5)["finished"].usage
        self.assertGreaterEqual(usage.cached_tokens, prompt - CHUNK - 8)

    def test_the_prompt_without_the_reasoning_is_computed_before_it_is_asked(self):
        for think in (True, False):
            history, question = [message("system", "Be brief."), message("user", "What is the capital of France?")], 0
            for turn in range(3):
                computed = self.stats().cache.tokens_computed
                out = self.chat(history, think=think, max_tokens=300)
                usage = out["finished"].usage
                self.assertEqual(out["finished"].reason, 1)
                if turn:  # all but the new message, the generation prompt and the token that is computed anyway
                    self.assertLess(usage.prompt_tokens - usage.cached_tokens, 24, usage)
                self.wait_for_what_comes_next(computed, usage)
                history += [t.Message(role=3, parts=[t.Part(text=out["text"])]), message("user", f"And of {turn}?")]
            warm = self.chat(history, think=think, max_tokens=40)
            cold = self.cold(history, think=think, max_tokens=40)
            self.assertEqual((warm["text"], warm["reasoning"]), (cold["text"], cold["reasoning"]))

    def test_while_tools_run_too(self):
        """What a loop will be without its reasoning is computed as it goes, so that its end leaves little to do."""
        for think in (True, False):
            history = [message("system", f"Be brief. {think} "), message("user", "What is the weather in Oslo?")]
            for turn in range(5):
                computed = self.stats().cache.tokens_computed
                out = self.chat(history, PROMPT["tools"], think=think, max_tokens=200, tool_choice=t.ToolChoice(mode=3))
                self.assertEqual(out["finished"].reason, 2)
                self.wait_for_what_comes_next(computed, out["finished"].usage)
                call = out["calls"][0]
                history += [t.Message(role=3, tool_calls=[t.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)]),
                            message("tool", f"{text(40, turn)}", call.id)]
            history.append(message("user", "Stop. Thank you."))  # at once
            usage = self.chat(history, PROMPT["tools"], think=think, max_tokens=20)["finished"].usage
            last = 40 * 2 + 60  # the last result, the message, markers
            self.assertLess(usage.prompt_tokens - usage.cached_tokens, last, (think, usage))

    def wait_for_what_comes_next(self, computed, usage):
        """More was computed than the request needed, and nothing is under way."""
        def is_done():
            stats = self.stats()
            return stats.cache.tokens_computed - computed > usage.prompt_tokens - usage.cached_tokens and stats.slots_used == 0
        self.d.wait_until(is_done)

    def test_a_salt_is_a_cache_of_its_own(self):
        messages = [message("user", text(200, 91))]
        counts = []
        for salt in ("a", "b", "a", ""):
            out = self.chat(messages, max_tokens=3, cache=t.CacheControl(salt=salt))
            counts.append(out["finished"].usage.cached_tokens > 100)
        self.assertEqual(counts, [False, False, True, False])

    def test_a_state_is_kept_after_a_message_of_the_clients_choice(self):
        one, two = text(120, 21), text(120, 22)
        history = [message("user", one), message("assistant", "Ok."), message("user", two), message("assistant", "Ok."),
                   message("user", text(120, 23)), message("assistant", "Ok."), message("user", text(120, 24)),
                   message("assistant", "Ok."), message("user", text(120, 25))]
        self.chat(history, max_tokens=3, cache=t.CacheControl(checkpoint_messages=[0]))
        usage = self.chat([history[0], message("assistant", "No."), message("user", "Why?")], max_tokens=3)["finished"].usage
        self.assertGreater(usage.cached_tokens, 120)

    def test_raw_prompts_too(self):
        q = m.GenerateRequest(text=text(300, 31), sampling=t.Sampling(temperature=0), stopping=t.Stopping(max_tokens=8))
        first, again = (gather(self.inference.Generate(q)) for _ in range(2))
        self.assertEqual(first["text"], again["text"])
        usage = again["finished"].usage
        self.assertGreaterEqual(usage.cached_tokens, usage.prompt_tokens - 2 * CHUNK)


class Branches(Cached):
    settings = {"model": {"max_sessions": 12}}

    def turn(self, i, words, **more):
        return gather(self.inference.Chat(request([message("user", words)] if words else [], session_id=i, **more)))

    def make(self, words):
        return self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", words)])).session.id

    def test_forks_go_on_from_one_computation(self):
        i = self.make(text(200, 13))
        self.turn(i, "Go on.", max_tokens=20)
        before = self.stats()
        forks = self.sessions.ForkSession(s.ForkSessionRequest(session_id=i, count=8, name="branch")).sessions
        self.assertEqual(len({f.id for f in forks}), 8)
        origin = self.sessions.GetSession(s.GetSessionRequest(session_id=i, with_messages=True))
        for f in forks:
            self.assertEqual((f.n_tokens, f.n_messages, f.generation, f.name),
                             (origin.session.n_tokens, origin.session.n_messages, origin.session.generation, "branch"))
        outs = {}

        def run(f, k):
            outs[k] = self.turn(f.id, text(6, k), max_tokens=30)
        threads = [threading.Thread(target=run, args=(f, k % 4)) for k, f in enumerate(forks[:4])]
        for x in threads:
            x.start()
        for x in threads:
            x.join()
        for k, out in outs.items():
            self.assertGreaterEqual(out["finished"].usage.cached_tokens, origin.session.n_tokens - 1)
            self.assertEqual(self.turn(forks[4 + k].id, text(6, k), max_tokens=30)["text"], out["text"])
        # no prompt but the new ones was computed
        new = sum(o["finished"].usage.prompt_tokens - origin.session.n_tokens + 1 for o in outs.values()) * 2
        self.assertLessEqual(self.stats().cache.tokens_computed - before.cache.tokens_computed, new)
        self.assertEqual(self.turn(i, text(6, 0), max_tokens=30)["text"], outs[0]["text"])
        shown = self.sessions.GetSession(s.GetSessionRequest(session_id=forks[0].id, with_messages=True))
        self.assertEqual(list(shown.messages)[:len(origin.messages)], list(origin.messages))
        for f in list(forks) + [origin.session]:
            self.sessions.CloseSession(s.CloseSessionRequest(session_id=f.id))

    def test_a_session_whose_reasoning_is_left_out_says_from_where_on_it_was_new(self):
        i = self.make(text(150, 41))
        first = self.turn(i, "", think=True, max_tokens=300)["finished"].usage
        self.assertEqual(first.cache_note, "")  # the session had it all
        self.assertGreater(first.reasoning_tokens, 0)
        q = request([message("user", "And now?")], session_id=i, max_tokens=5)
        q.reasoning.CopyFrom(t.Reasoning(mode=1, preserve=False))
        usage = gather(self.inference.Chat(q))["finished"].usage
        self.assertLess(usage.cached_tokens, usage.prompt_tokens)
        self.assertRegex(usage.cache_note, r"new from token \d+ on, in messages\[[12]\]; the last state kept before")
        self.sessions.CloseSession(s.CloseSessionRequest(session_id=i))

    def test_a_session_goes_back_and_another_way(self):
        i = self.make(text(150, 33))
        said = [self.turn(i, text(8, k), max_tokens=16, think=k == 1) for k in range(3)]
        before = self.sessions.GetSession(s.GetSessionRequest(session_id=i)).session
        self.assertEqual(before.n_messages, 7)
        with self.assertRaises(grpc.RpcError) as e:
            self.sessions.RewindSession(s.RewindSessionRequest(session_id=i, n_messages=8))
        self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        with self.assertRaises(grpc.RpcError) as e:
            self.sessions.RewindSession(s.RewindSessionRequest(session_id=i, n_messages=3, expect_generation=1))
        self.assertEqual(e.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)
        for keep in (5, 4):  # behind an answer; behind a question, which is asked again then
            back = self.sessions.RewindSession(s.RewindSessionRequest(session_id=i, n_messages=keep)).session
            self.assertEqual(back.n_messages, keep)
            self.assertLess(back.n_tokens, before.n_tokens)
            again = self.turn(i, text(8, 2) if keep == 5 else None, max_tokens=16, think=keep == 4)
            self.assertEqual((again["text"], again["reasoning"]), (said[2 if keep == 5 else 1]["text"],
                                                                   said[2 if keep == 5 else 1]["reasoning"]))
            usage = again["finished"].usage
            self.assertGreater(usage.cached_tokens, usage.prompt_tokens - 100)
        fork = self.sessions.ForkSession(s.ForkSessionRequest(session_id=i, n_messages=3)).sessions[0]
        self.assertEqual(self.turn(fork.id, text(8, 1), max_tokens=16, think=True)["reasoning"], said[1]["reasoning"])
        for x in (i, fork.id):
            self.sessions.CloseSession(s.CloseSessionRequest(session_id=x))


class Pressure(Cached):
    settings = {"model": {"max_sessions": 2, "kv_tokens": 4096, "ctx_max": 2048}, "cache": {"checkpoints": 32}}

    def test_sessions_that_made_room_go_on_where_they_were(self):
        names, texts = range(5), {}
        for think in (False, True):
            ids = [self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", text(60, 50 + n))])).session.id
                   for n in names]
            for turn in range(3):
                for n in names:
                    out = gather(self.inference.Chat(request([message("user", text(20, n + turn))], session_id=ids[n],
                                                             max_tokens=24, think=think)))
                    usage = out["finished"].usage
                    texts.setdefault((think, n), []).append((out["text"], out["reasoning"]))
                    if turn:
                        self.assertGreater(usage.cached_tokens, 0)
            for i in ids:
                self.sessions.CloseSession(s.CloseSessionRequest(session_id=i))
        # alone, in a daemon where nobody makes room and nothing is kept
        with daemon.Daemon(model={"max_sessions": 2}, cache={"enabled": "no"}) as d:
            inference = d.stub(end_to_end.INFERENCE, "InferenceService")
            sessions = d.stub(end_to_end.SESSION, "SessionService")
            for (think, n), said in texts.items():
                i = sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", text(60, 50 + n))])).session.id
                for turn in range(3):
                    out = gather(inference.Chat(request([message("user", text(20, n + turn))], session_id=i, max_tokens=24,
                                                        think=think)))
                    self.assertEqual((out["text"], out["reasoning"]), said[turn], (think, n, turn))
                sessions.CloseSession(s.CloseSessionRequest(session_id=i))

    def test_a_turn_that_was_cancelled_in_line_leaves_no_trace(self):
        i = self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", text(80, 8))])).session.id
        before = self.sessions.GetSession(s.GetSessionRequest(session_id=i)).session
        blockers = [self.inference.Chat(request([message("user", "Count to a thousand.")], max_tokens=1500, temperature=1.0))
                    for _ in range(2)]
        for b in blockers:
            next(b)
        waiting = self.inference.Chat(request([message("user", "hi")], session_id=i))
        reader = threading.Thread(target=lambda: [x for x in self.ignore(waiting)])
        reader.start()
        waiting.cancel()
        reader.join()
        for b in blockers:
            b.cancel()
        after = self.sessions.GetSession(s.GetSessionRequest(session_id=i)).session
        self.assertEqual((after.n_tokens, after.n_messages, after.generation),
                         (before.n_tokens, before.n_messages, before.generation))
        for _ in range(300):
            try:
                out = gather(self.inference.Chat(request([message("user", "hi")], session_id=i, max_tokens=8)))
                break
            except grpc.RpcError as e:  # the cancelled turn may still be on its way out
                self.assertEqual(e.code(), grpc.StatusCode.ABORTED)
                time.sleep(0.1)
        self.assertGreater(out["finished"].usage.cached_tokens, 80)
        self.sessions.CloseSession(s.CloseSessionRequest(session_id=i))

    @staticmethod
    def ignore(events):
        try:
            yield from events
        except grpc.RpcError:
            pass


class Host(Pressure):
    """The same with few states on the device and many on the host."""
    settings = {"model": {"max_sessions": 2, "kv_tokens": 4096, "ctx_max": 2048},
                "cache": {"checkpoints": 3, "host_bytes": "64M"}}

    @classmethod
    def tearDownClass(cls):
        cache = cls.model.GetStats(daemon.module(MODEL).GetStatsRequest()).cache
        assert cache.moves > 5 and cache.host_checkpoints_max > 5, cache
        super().tearDownClass()


if __name__ == "__main__":
    unittest.main()
