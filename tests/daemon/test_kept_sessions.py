"""Named sessions over restarts: they go on as if nothing had been, whoever killed the daemon, and what cannot be
read or written is told and harms nobody."""
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
import grpc  # noqa: E402
import test_end_to_end as end_to_end  # noqa: E402
from test_end_to_end import PROMPT, gather, message, request  # noqa: E402

t = m = s = None


def setUpModule():
    global t, m, s
    t, m, s = end_to_end.load_modules()


class Kept(end_to_end.WithState):
    def restart(self, kill=False):
        if kill:
            self.d.process.send_signal(signal.SIGKILL)
            self.d.process.wait()
        self.d.stop()
        self.start()

    def files(self):
        return sorted(p.name for p in (self.state / "sessions").iterdir())

    def written(self, i, before=None, seconds=10):
        """Waits until the file of the session is another one than before."""
        path, end = self.state / "sessions" / f"{i}.session", time.monotonic() + seconds
        while True:
            now = path.read_bytes() if path.exists() else None
            if now is not None and now != before:
                return now
            self.assertLess(time.monotonic(), end, "nothing was written")
            time.sleep(0.005)

    def turn(self, i, messages, reasoning_preserve=None, **more):
        q = request(messages, session_id=i, **more)
        if reasoning_preserve is not None:
            q.reasoning.preserve = reasoning_preserve
        return gather(self.inference.Chat(q))

    def conversation(self, after_turn):
        """A tool call, its result, and two more turns; the words of all of them."""
        said = []
        i = self.sessions.CreateSession(s.CreateSessionRequest(
            name="kept", tools=[t.Tool(openai_json=json.dumps(x)) for x in PROMPT["tools"]],
            )).session.id
        after_turn(i)
        out = self.turn(i, [message(x["role"], x["content"]) for x in PROMPT["messages"][:2]])
        said.append(out["calls"][0].arguments_json)
        after_turn(i)
        out = self.turn(i, [message("tool", PROMPT["messages"][3]["content"], out["calls"][0].id)])
        said.append(out["text"])
        after_turn(i)
        for k in range(2):
            out = self.turn(i, [message("user", "Thank you. And tomorrow?")], think=k == 1, max_tokens=60)
            said.append((out["text"], out["reasoning"]))
            after_turn(i)
        return i, said

    def test_a_restart_after_every_turn_changes_no_word(self):
        self.start()
        want = self.conversation(lambda i: None)[1]
        for kill in (False, True):
            last = {}

            def after(i):
                last[i] = self.written(i, last.get(i))
                before = self.sessions.GetSession(s.GetSessionRequest(session_id=i, with_messages=True))
                self.restart(kill)
                now = self.sessions.GetSession(s.GetSessionRequest(session_id=i, with_messages=True))
                self.assertEqual((now.session.name, now.session.generation, now.session.n_messages, list(now.messages),
                                  list(now.tools)),
                                 ("kept", before.session.generation, before.session.n_messages, list(before.messages),
                                  list(before.tools)))
            i, said = self.conversation(after)
            self.assertEqual(said, want)
            self.assertIn(i, [x.id for x in self.sessions.ListSessions(s.ListSessionsRequest()).sessions])
            self.sessions.CloseSession(s.CloseSessionRequest(session_id=i))
            self.assertNotIn(f"{i}.session", self.files())

    def states(self):
        return sorted((self.state / "cache").glob("*.state"))

    def settled(self, seconds=30):
        """Waits until nothing is on its way to the disk any more."""
        end, before = time.monotonic() + seconds, None
        while True:
            time.sleep(0.4)
            now = [(p.name, p.stat().st_size) for p in (self.state / "cache").iterdir()]
            if now and now == before:
                return
            self.assertLess(time.monotonic(), end)
            before = now

    def test_a_restart_is_warm_whatever_ended_the_daemon(self):
        long = "The quick brown fox jumps over the lazy dog. " * 60
        fast = {"cache": {"disk_idle": "50ms"}}
        self.start(**fast)
        i = self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", long)])).session.id
        self.turn(i, [message("user", "Go on.")], max_tokens=12)
        chat = request([message("system", long[9:]), message("user", "Hello.")], max_tokens=12)
        first = gather(self.inference.Chat(chat))["text"]
        for kill in (False, True, False, True):
            if kill:
                self.settled()
                self.d.process.send_signal(signal.SIGKILL)
                self.d.process.wait()
            self.d.stop()
            self.start(**(fast if not kill else {}))
            self.d.wait_until(lambda: "checkpoints found in" in self.d.log)
            out = self.turn(i, [message("user", "And on.")], max_tokens=12)
            usage = out["finished"].usage
            self.assertLess(usage.prompt_tokens - usage.cached_tokens, 100, usage)
            out = gather(self.inference.Chat(chat))
            usage = out["finished"].usage
            self.assertLess(usage.prompt_tokens - usage.cached_tokens, 80, usage)
            self.assertEqual(out["text"], first)
            self.d.stop()
            self.start(**fast)
        self.d.stop()
        # What is damaged, or no file of the cache's, is told and computed again.
        whole = {p: p.read_bytes() for p in self.states()}
        for k in range(4):
            for p, text in whole.items():
                p.write_bytes((text[:len(text) // 2], b"", text[:40] + b"x" * 8 + text[48:],
                               text[:len(text) - 900] + b"x" * 64 + text[len(text) - 836:])[k])
            (self.state / "cache" / "write.new").write_bytes(b"half")
            self.start(**fast)
            self.assertEqual(gather(self.inference.Chat(chat))["text"], first)
            self.d.wait_until(lambda: "damaged and taken away" in self.d.log or "a state is lost" in self.d.log)
            self.assertIn("a write that was cut off is taken away", self.d.log)
            self.d.process.send_signal(signal.SIGKILL)
            self.d.process.wait()
            self.d.stop()
            for p in (self.state / "cache").iterdir():
                p.unlink()

    def test_states_leave_the_device_and_come_back(self):
        """More conversations than the device has room for: each goes on warm, with the words of one that
        never left."""
        texts = [f"{k} times the quick brown fox jumped. " * 40 for k in range(6)]
        said = {}
        for small in (False, True):
            shutil.rmtree(self.state / "cache", ignore_errors=True)
            self.start(cache={"disk_idle": "20ms", "checkpoints": 2 if small else 64},
                       model={"max_sessions": 2, "kv_tokens": 2048 if small else 65536})
            ids = [self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", x)])).session.id
                   for x in texts]
            for turn in range(3):
                for k, i in enumerate(ids):
                    out = self.turn(i, [message("user", f"Question {turn}?")], max_tokens=8)
                    self.assertEqual(said.setdefault((turn, k), out["text"]), out["text"])
                    usage = out["finished"].usage
                    if turn:
                        self.assertLess(usage.prompt_tokens - usage.cached_tokens, 120, (turn, k, usage))
                    time.sleep(0.3)  # longer than idle
            for sign in ("a state is lost", "does not go to the disk", "damaged"):
                self.assertNotIn(sign, self.d.log)
            cache = self.d.stub("deltad/v1/model.proto", "ModelService").GetStats(
                daemon.module("deltad/v1/model.proto").GetStatsRequest()).cache
            self.assertGreater(cache.disk_writes, 10, cache)
            self.assertEqual(cache.disk_reads > 5, small, cache)
            self.assertEqual((cache.disk_checkpoints, cache.disk_bytes),
                             (len(self.states()), sum(p.stat().st_size for p in self.states())))
            self.assertEqual((cache.disk_bytes_max, cache.disk_waiting), (4 << 30, 0))
            out = subprocess.run([daemon.BUILD / "clients/deltactl", "--socket", self.d.ttrpc, "status"],
                                 capture_output=True, text=True, timeout=60).stdout
            self.assertRegex(out, r"disk +\d+ checkpoints, \d+\.\d of 4295 MB.*; \d+ written, \d+ read, 0 given up")
            self.d.stop()

    def test_a_full_disk_keeps_what_is_there(self):
        self.start(cache={"disk_idle": "20ms"}, wrap=["prlimit", "--fsize=40000"])
        for k in range(3):
            i = self.sessions.CreateSession(s.CreateSessionRequest()).session.id
            self.assertTrue(self.turn(i, [message("user", f"{k} words. " * 300)], max_tokens=3)["finished"])
        self.d.wait_until(lambda: "the cache does not go to the disk" in self.d.log)
        self.assertEqual(self.d.log.count("the cache does not go to the disk"), 1)
        self.assertEqual(self.states(), [])

    def test_a_turn_that_computes_again_says_why(self):
        self.start(cache={"disk_bytes": 0})
        i = self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", "Hello. " * 60)])).session.id
        usage = self.turn(i, [message("user", "Go on.")], max_tokens=8, think=True)["finished"].usage
        self.assertEqual(usage.cache_note, "")
        x = self.turn(i, [message("user", "And on.")], max_tokens=8, reasoning_preserve=False)["finished"].usage
        self.assertRegex(x.cache_note, r"new from token \d+ on, in messages\[2\]; the last state kept before")
        self.d.stop()
        self.start(cache={"disk_bytes": 0})
        x = self.turn(i, [message("user", "Still there?")], max_tokens=8)["finished"].usage
        self.assertEqual((x.cached_tokens, x.cache_note),
                         (0, "the session is computed again: nothing of it was still kept"))

    def test_forks_and_rewound_sessions_are_kept(self):
        self.start()
        i = self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", "Hello.")])).session.id
        first = self.turn(i, [message("user", "How are you?")], max_tokens=20)["text"]
        fork = self.sessions.ForkSession(s.ForkSessionRequest(session_id=i, name="other")).sessions[0].id
        self.sessions.RewindSession(s.RewindSessionRequest(session_id=i, n_messages=1))
        self.restart()  # a stop waits for what is being written
        at = {x.id: x for x in self.sessions.ListSessions(s.ListSessionsRequest()).sessions}
        self.assertEqual((at[i].n_messages, at[fork].n_messages, at[fork].name), (1, 3, "other"))
        self.assertEqual(self.turn(i, [message("user", "How are you?")], max_tokens=20)["text"], first)

    def test_what_cannot_be_read_stays_and_is_told(self):
        self.start()
        ids = [self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", f"Hello {k}.")])).session.id
               for k in range(4)]
        self.d.stop()
        folder = self.state / "sessions"
        paths = [folder / f"{i}.session" for i in ids]
        whole = [p.read_bytes() for p in paths]
        paths[0].write_bytes(whole[0][:-5])
        paths[1].write_bytes(whole[1][:-5] + b"xxxxx")
        (folder / ("x" * 24 + ".session")).write_bytes(whole[2])
        (folder / f"{ids[3]}.session.new").write_bytes(b"half")
        self.start()
        found = {x.id for x in self.sessions.ListSessions(s.ListSessionsRequest()).sessions}
        self.assertEqual(found, set(ids[2:]))
        self.assertEqual(self.d.log.count("a session is not taken up"), 3)
        self.assertIn("not whole", self.d.log)
        self.assertTrue(paths[0].exists() and paths[1].exists())

    def test_a_full_disk_is_told_and_leaves_what_was_kept(self):
        self.start(wrap=["prlimit", "--fsize=40000"])
        i = self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", "Hello.")])).session.id
        before = self.written(i)
        self.turn(i, [message("user", "word " * 12000)], max_tokens=3)
        self.d.wait_until(lambda: "is not kept" in self.d.log)
        self.assertIn("File too large", self.d.log)
        self.assertEqual(self.written(i), before)
        self.assertEqual(len(self.files()), 1)
        self.assertTrue(self.turn(i, [message("user", "Still there?")], max_tokens=3)["finished"])
        self.restart()
        kept = self.sessions.GetSession(s.GetSessionRequest(session_id=i)).session
        self.assertEqual(kept.n_messages, 1)

    def test_closed_in_the_middle_of_writing_leaves_no_file(self):
        self.start()
        for k in range(30):
            i = self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", "Hi. " * 500)])).session.id
            self.sessions.CloseSession(s.CloseSessionRequest(session_id=i))
        self.d.stop()
        self.assertEqual(self.files(), [])


if __name__ == "__main__":
    unittest.main()
