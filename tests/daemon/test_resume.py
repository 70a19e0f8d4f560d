"""Answers that outlive their calls: every event comes once, in order, whoever reads and however often the
connection breaks."""
import pathlib
import sys
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
import grpc  # noqa: E402
import test_end_to_end as end_to_end  # noqa: E402
import ttrpc  # noqa: E402
from test_end_to_end import MODEL, gather, message, request  # noqa: E402

t = m = s = None


def setUpModule():
    global t, m, s, d, inference, sessions, model
    m, s = daemon.module(end_to_end.INFERENCE), daemon.module(end_to_end.SESSION)
    t = daemon.module("deltad/v1/types.proto")
    end_to_end.t, end_to_end.m, end_to_end.s = t, m, s
    d = daemon.Daemon(limits={"resume_limit": "5s", "detach_limit": "3s"})
    inference, sessions = d.stub(end_to_end.INFERENCE, "InferenceService"), d.stub(end_to_end.SESSION, "SessionService")
    model = d.stub(MODEL, "ModelService")


def tearDownModule():
    d.stop()


def story(**more):
    return request([message("user", "Tell me a long story about a fox.")], temperature=1.0, **more)


def resume(i, start=0):
    return inference.Resume(m.ResumeRequest(request_id=i, from_seq=start))


def running():
    return model.GetStats(daemon.module(MODEL).GetStatsRequest()).requests_running


class Resume(unittest.TestCase):
    def refused(self, call, code, reason):
        with self.assertRaises(grpc.RpcError) as e:
            list(call)
        self.assertEqual(e.exception.code(), code)
        self.assertIn(reason, str(e.exception.trailing_metadata()))

    def test_every_event_once_over_many_breaks(self):
        whole = None
        for step in (1, 3, 17):
            events, call = [], inference.Chat(story(max_tokens=120, detach=True, seed=5, include=[1]))
            first = next(call)
            events.append(first.SerializeToString())
            i, seq = first.accepted.request_id, 1
            while True:
                for _ in range(step):
                    e = next(call, None)
                    if e is None:
                        break
                    seq += 1
                    self.assertEqual(e.seq, seq)
                    events.append(e.SerializeToString())
                if e is None:
                    break
                call.cancel()
                call = resume(i, seq + 1)
            out = gather(m.ChatEvent.FromString(e) for e in events)
            self.assertEqual(out["finished"].reason, 3)
            again = [e.SerializeToString() for e in resume(i)]
            self.assertEqual(again, events)
            self.assertEqual([e.SerializeToString() for e in resume(i, 7)], events[6:])
            if whole:
                self.assertEqual((out["text"], out["reasoning"]), whole)
            whole = out["text"], out["reasoning"]

    def test_an_answer_without_a_reader_runs_on_and_goes_after_a_while(self):
        call = inference.Chat(story(max_tokens=60, detach=True))
        i = next(call).accepted.request_id
        call.cancel()
        d.wait_until(lambda: running() == 0)
        out = gather(resume(i))
        self.assertEqual(out["finished"].usage.completion_tokens, 60)
        self.refused(resume(i, 10000), grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
        time.sleep(5.5)
        self.refused(resume(i), grpc.StatusCode.NOT_FOUND, "REQUEST_UNKNOWN")
        # without detach nothing is kept
        call = inference.Chat(story(max_tokens=60))
        i = next(call).accepted.request_id
        self.refused(resume(i), grpc.StatusCode.NOT_FOUND, "REQUEST_UNKNOWN")
        call.cancel()

    def test_nobody_comes_back(self):
        call = inference.Chat(m.ChatRequest(messages=[message("user", "Count.")], detach=True,
                                            stopping=t.Stopping(max_tokens=20000, ignore_eos=True)))
        i = next(call).accepted.request_id
        call.cancel()
        d.wait_until(lambda: running() == 1)
        d.wait_until(lambda: running() == 0)  # detach_limit
        self.assertEqual(list(resume(i))[-1].finished.reason, 5)

    def test_cancel_ends_a_detached_answer(self):
        call = inference.Chat(m.ChatRequest(messages=[message("user", "Count.")], detach=True,
                                            stopping=t.Stopping(max_tokens=20000, ignore_eos=True)))
        i = next(call).accepted.request_id
        call.cancel()
        inference.Cancel(m.CancelRequest(request_id=i))
        self.assertEqual(list(resume(i))[-1].finished.reason, 5)

    def test_a_second_reader_takes_over(self):
        call = inference.Chat(m.ChatRequest(messages=[message("user", "Count.")], detach=True,
                                            stopping=t.Stopping(max_tokens=2000, ignore_eos=True)))
        i = next(call).accepted.request_id
        second = resume(i)
        self.assertEqual(next(second).seq, 1)
        self.refused(call, grpc.StatusCode.ABORTED, "TAKEN_OVER")
        inference.Cancel(m.CancelRequest(request_id=i))
        self.assertEqual(list(second)[-1].finished.reason, 5)

    def test_a_key_runs_once(self):
        q = story(max_tokens=40, idempotency_key="order-66", seed=9)
        prompts = model.GetStats(daemon.module(MODEL).GetStatsRequest()).completion_tokens_total
        call = inference.Chat(q)
        next(call)
        next(call)
        call.cancel()
        first = [e.SerializeToString() for e in inference.Chat(q)]
        self.assertEqual([e.SerializeToString() for e in inference.Chat(q)], first)
        self.assertEqual(model.GetStats(daemon.module(MODEL).GetStatsRequest()).completion_tokens_total - prompts, 40)
        self.refused(inference.Chat(story(max_tokens=41, idempotency_key="order-66", seed=9)),
                     grpc.StatusCode.FAILED_PRECONDITION, "KEY_REUSED")
        self.refused(inference.Chat(story(idempotency_key="x" * 64)), grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")

    def test_in_a_session_a_key_makes_one_turn(self):
        i = sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", "Hello.")])).session.id
        q = request([message("user", "How are you?")], session_id=i, idempotency_key="turn-1", max_tokens=10)
        a, b = gather(inference.Chat(q)), gather(inference.Chat(q))
        self.assertEqual(a["text"], b["text"])
        x = sessions.GetSession(s.GetSessionRequest(session_id=i)).session
        self.assertEqual((x.generation, x.n_messages), (1, 3))
        sessions.CloseSession(s.CloseSessionRequest(session_id=i))

    def test_over_ttrpc_too(self):
        with ttrpc.Client(str(d.ttrpc), timeout=60) as c:
            q = story(max_tokens=30, detach=True)
            first = [m.ChatEvent.FromString(b) for b in c.messages(c.start(end_to_end.CHAT, q.SerializeToString()))]
            again = c.messages(c.start("/deltad.v1.InferenceService/Resume",
                                       m.ResumeRequest(request_id=first[0].accepted.request_id).SerializeToString()))
            self.assertEqual([m.ChatEvent.FromString(b) for b in again], first)


class Stop(unittest.TestCase):
    def test_a_stop_does_not_wait_for_readers_that_may_come(self):
        with daemon.Daemon() as other:
            calls = other.stub(end_to_end.INFERENCE, "InferenceService")
            gather(calls.Chat(story(max_tokens=5, detach=True)))
            call = calls.Chat(m.ChatRequest(messages=[message("user", "Count.")], detach=True,
                                            stopping=t.Stopping(max_tokens=20000, ignore_eos=True)))
            next(call)
            call.cancel()
            time.sleep(0.1)
            start = time.monotonic()
        self.assertLess(time.monotonic() - start, 5)


if __name__ == "__main__":
    unittest.main()
