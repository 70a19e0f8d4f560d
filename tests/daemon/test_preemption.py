"""Answers that outgrow the memory take turns: each waits with its state kept and says what it says alone."""
import pathlib
import sys
import threading
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
import grpc  # noqa: E402
from test_end_to_end import gather, message  # noqa: E402
import test_end_to_end as end_to_end  # noqa: E402
import test_prefix_cache as cached  # noqa: E402

LONG = "Count to a thousand."


def setUpModule():
    global t, m, s
    t, m, s = end_to_end.load_modules()


def ask(text, n, priority=0, **more):
    return m.ChatRequest(messages=[message("user", text)], reasoning=t.Reasoning(mode=2),
                         sampling=t.Sampling(temperature=0.0), stopping=t.Stopping(max_tokens=n, ignore_eos=True),
                         scheduling=t.Scheduling(priority=priority), **more)


class Preempted(cached.Cached):
    def start(self, *args, **more):
        """A thread that gathers an answer into its .out."""
        def run():
            thread.out = gather(self.inference.Chat(ask(*args, **more)))
        thread = threading.Thread(target=run)
        thread.start()
        return thread


class Short(Preempted):
    """1,536 tokens for answers that come to 2,400."""
    settings = {"model": {"max_sessions": 8, "kv_tokens": 1536, "answer_tokens": 64}}

    def test_answers_that_do_not_fit_side_by_side(self):
        prompts = [f"{LONG} Begin at {k}." for k in range(4)]
        alone = [gather(self.inference.Chat(ask(p, 600))) for p in prompts]
        before = self.stats()
        threads = [self.start(p, 600) for p in prompts]
        for x in threads:
            x.join()
        for x, one in zip(threads, alone):
            self.assertEqual(x.out["text"], one["text"])
            usage = x.out["finished"].usage
            self.assertEqual(usage.completion_tokens, 600)
        after = self.stats()
        self.assertGreater(after.preemptions_total, before.preemptions_total)
        self.assertEqual((after.requests_queued, after.requests_running, after.pages_used), (0, 0, 0))

    def test_one_that_waits_for_the_second_time_is_cancelled(self):
        for _ in range(3):
            before = self.stats().preemptions_total
            calls = [self.inference.Chat(ask(f"{LONG} From {k}.", 1200)) for k in range(3)]
            readers = [threading.Thread(target=self.read, args=(c,)) for c in calls]
            for r in readers:
                r.start()
            self.d.wait_until(lambda: self.stats().preemptions_total > before and self.stats().requests_queued, 60)
            for c in reversed(calls):  # the last of them waits
                c.cancel()
            for r in readers:
                r.join()
            self.d.wait_until(lambda: self.stats().requests_running + self.stats().requests_queued == 0, 60)
            self.assertEqual(self.stats().pages_used, 0)

    def test_a_session_in_the_middle_of_it_goes_on(self):
        i = self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", LONG)])).session.id
        others = [self.start(f"{LONG} From {k}.", 600) for k in range(3)]
        first = gather(self.inference.Chat(ask("Go.", 500, session_id=i)))
        for x in others:
            x.join()
        self.assertEqual(first["finished"].usage.completion_tokens, 500)
        shown = self.sessions.GetSession(s.GetSessionRequest(session_id=i)).session
        self.assertGreater(shown.n_tokens, 500)
        again = gather(self.inference.Chat(ask("And?", 8, session_id=i)))["finished"].usage
        self.assertGreater(again.prompt_tokens, 500)  # its state may have gone: there is no room for all of them
        self.sessions.CloseSession(s.CloseSessionRequest(session_id=i))

    @staticmethod
    def read(call):
        try:
            for _ in call:
                pass
        except grpc.RpcError:
            pass


class Priority(Preempted):
    settings = {"model": {"max_sessions": 1}}

    def test_a_request_of_higher_priority_does_not_wait(self):
        alone = gather(self.inference.Chat(ask(LONG, 700)))["text"]
        low = self.start(LONG, 700, t.Scheduling.PRIORITY_LOW)
        self.d.wait_until(lambda: self.stats().requests_running == 1)
        time.sleep(0.05)
        high = gather(self.inference.Chat(ask("hi", 8, t.Scheduling.PRIORITY_HIGH)))
        self.assertTrue(low.is_alive())
        self.assertEqual(high["finished"].usage.completion_tokens, 8)
        low.join()
        self.assertEqual(low.out["text"], alone)
        self.assertEqual(self.stats().preemptions_total, 1)
        # one of the same waits
        low = self.start(LONG, 300)
        self.d.wait_until(lambda: self.stats().requests_running == 1)
        gather(self.inference.Chat(ask("hi", 8)))
        low.join()
        self.assertEqual(self.stats().preemptions_total, 1)


if __name__ == "__main__":
    unittest.main(verbosity=1)
