"""Pinned sessions rest as long as they like and make room last; exported ones go on elsewhere; over gRPC and ttrpc."""
import json
import os
import pathlib
import subprocess
import sys
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
import grpc  # noqa: E402
import ttrpc  # noqa: E402
import test_end_to_end as end_to_end  # noqa: E402
from test_end_to_end import PROMPT, gather, message, request  # noqa: E402

t = m = s = None
SERVICE = "/deltad.v1.SessionService/"


def setUpModule():
    global t, m, s
    t, m, s = end_to_end.load_modules()


class Base(end_to_end.WithState):
    def create(self, text="Hello.", **more):
        return self.sessions.CreateSession(s.CreateSessionRequest(messages=[message("user", text)], **more)).session.id

    def pin(self, i, unpin=False):
        return self.sessions.PinSession(s.PinSessionRequest(session_id=i, unpin=unpin)).session

    def listed(self):
        return {x.id: x for x in self.sessions.ListSessions(s.ListSessionsRequest()).sessions}

    def turn(self, i, messages, **more):
        return gather(self.inference.Chat(request(messages, session_id=i, **more)))

    def export(self, i, with_sampled=False):
        pieces = [x.piece for x in self.sessions.ExportSession(
            s.ExportSessionRequest(session_id=i, with_sampled=with_sampled))]
        self.assertTrue(all(0 < len(p) <= 1 << 20 for p in pieces), [len(p) for p in pieces])
        return s.SessionExport.FromString(b"".join(pieces)), pieces


class Pinned(Base):
    def test_the_time_to_live_runs_for_the_others_alone(self):
        self.start()
        ids = [self.create(idle_timeout_ns=300_000_000) for _ in range(2)]
        self.assertTrue(self.pin(ids[0]).pinned)
        self.d.wait_until(lambda: ids[1] not in self.listed())
        time.sleep(0.5)
        self.assertTrue(self.listed()[ids[0]].pinned)
        self.assertTrue(self.sessions.GetSession(s.GetSessionRequest(session_id=ids[0])).session.pinned)
        self.assertFalse(self.pin(ids[0], unpin=True).pinned)
        self.d.wait_until(lambda: ids[0] not in self.listed())

    def test_as_many_as_the_limit_says(self):
        self.start(limits={"max_pinned_sessions": 2})
        ids = [self.create() for _ in range(3)]
        for i in (ids[0], ids[1], ids[1]):
            self.pin(i)
        with self.assertRaises(grpc.RpcError) as e:
            self.pin(ids[2])
        self.assertEqual(e.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        self.pin(ids[2], unpin=True)  # it was not: nothing happens
        self.sessions.CloseSession(s.CloseSessionRequest(session_id=ids[0]))
        self.assertTrue(self.pin(ids[2]).pinned)
        fork = self.sessions.ForkSession(s.ForkSessionRequest(session_id=ids[2])).sessions[0]
        self.assertFalse(fork.pinned)
        with self.assertRaises(grpc.RpcError) as e:
            self.pin("nobody")
        self.assertEqual(e.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_it_makes_room_last(self):
        self.start(model={"max_sessions": 2})
        pinned, other = self.create("One."), self.create("Two.")
        self.pin(pinned)
        for k in range(3):
            self.turn(other, [message("user", f"And {k}?")], max_tokens=4)  # the pinned one rested longer
            third = self.create(f"Three {k}.")
            now = self.listed()
            self.assertFalse(now[pinned].parked)
            self.assertTrue(now[other].parked)
            self.sessions.CloseSession(s.CloseSessionRequest(session_id=third))
        self.pin(third := self.create("Three."))
        self.turn(other, [message("user", "Is there room?")], max_tokens=4)  # nobody else is left to make it
        self.assertEqual([self.listed()[i].parked for i in (pinned, third)], [True, False])

    def test_it_stays_pinned_over_a_restart(self):
        self.start()
        i = self.create()
        self.pin(i)
        self.d.stop()
        self.start()
        self.assertTrue(self.listed()[i].pinned)
        self.turn(i, [message("user", "Still there?")], max_tokens=4)

    def test_over_ttrpc(self):
        self.start()
        i = self.create()
        with ttrpc.Client(str(self.d.ttrpc)) as c:
            a = c.unary(SERVICE + "PinSession", s.PinSessionRequest(session_id=i).SerializeToString())
            self.assertTrue(s.PinSessionResponse.FromString(a).session.pinned)
            pieces = [s.ExportSessionResponse.FromString(p).piece for p in
                      c.stream(SERVICE + "ExportSession", s.ExportSessionRequest(session_id=i).SerializeToString())]
            self.assertEqual(s.SessionExport.FromString(b"".join(pieces)).messages[0].parts[0].text, "Hello.")
            with self.assertRaises(ttrpc.Error) as e:
                list(c.stream(SERVICE + "ExportSession", s.ExportSessionRequest(session_id="x").SerializeToString()))
            self.assertEqual(e.exception.code, 5)


class Exported(Base):
    def test_what_was_said_goes_on_elsewhere(self):
        self.start()
        i = self.sessions.CreateSession(s.CreateSessionRequest(
            name="carried", tools=[t.Tool(openai_json=json.dumps(x)) for x in PROMPT["tools"]])).session.id
        out = self.turn(i, [message(x["role"], x["content"]) for x in PROMPT["messages"][:2]])
        x, _ = self.export(i, True)
        got = self.sessions.GetSession(s.GetSessionRequest(session_id=i, with_messages=True))
        self.assertEqual((x.name, x.generation, list(x.messages), list(x.tools)),
                         ("carried", 1, list(got.messages), list(got.tools)))
        self.assertEqual([a.message for a in x.sampled], [2])
        self.assertGreater(len(x.sampled[0].token_ids), 3)
        self.assertFalse(self.export(i)[0].sampled)
        other = self.sessions.CreateSession(s.CreateSessionRequest(
            name=x.name, tools=x.tools, messages=x.messages, reasoning=x.reasoning)).session.id
        result = [message("tool", PROMPT["messages"][3]["content"], out["calls"][0].id)]
        self.assertEqual(self.turn(other, result)["text"], self.turn(i, result)["text"])

    def test_a_long_one_comes_in_pieces_of_one_moment(self):
        self.start()
        i = self.sessions.CreateSession(s.CreateSessionRequest()).session.id
        empty, _ = self.export(i)
        self.assertFalse(empty.messages)
        words = [f"{k} " + "x" * 200_000 for k in range(12)]
        # Not computed: a prompt of that length is refused, so the transcript is made on disk.
        self.d.stop()
        self.state_of(i, words)
        self.start()
        x, pieces = self.export(i)
        self.assertGreater(len(pieces), 2)
        self.assertEqual([y.parts[0].text for y in x.messages], words)
        call = self.sessions.ExportSession(s.ExportSessionRequest(session_id=i))
        next(call)
        self.sessions.CloseSession(s.CloseSessionRequest(session_id=i))
        self.assertGreater(len(b"".join(p.piece for p in call)), 1 << 20)

    def state_of(self, i, words):
        import hashlib
        path = self.state / "sessions" / f"{i}.session"
        head, body = path.read_bytes().split(b"\n", 1)
        for w in words:
            packed = message("user", w).SerializeToString()
            body += ttrpc.field(14, packed)
        path.write_bytes(b"deltad session 1 %d %s\n" % (len(body), hashlib.sha256(body).hexdigest().encode()) + body)

    def test_a_reader_who_leaves_and_too_many_of_them(self):
        self.start()
        i = self.sessions.CreateSession(s.CreateSessionRequest()).session.id
        self.d.stop()
        self.state_of(i, ["x" * 500_000] * 40)
        self.start()
        held = []
        for _ in range(16):
            stub = self.d.stub(end_to_end.SESSION, "SessionService", self.d.channel())
            held.append(stub.ExportSession(s.ExportSessionRequest(session_id=i)))
            next(held[-1])
        with self.assertRaises(grpc.RpcError) as e:
            list(self.sessions.ExportSession(s.ExportSessionRequest(session_id=i)))
        self.assertEqual(e.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        for call in held:
            call.cancel()

        def has_room():
            try:
                return len(self.export(i)[0].messages) == 40
            except grpc.RpcError:
                return False
        self.d.wait_until(has_room)

    def test_deltactl_and_the_python_client(self):
        self.start()
        i = self.create()
        ctl = [daemon.BUILD / "clients/deltactl", "--socket", self.d.ttrpc]

        def run(*args):
            r = subprocess.run([*ctl, *args], capture_output=True, text=True)
            self.assertEqual((r.returncode, r.stderr), (0, ""))
            return r.stdout
        self.assertIn("pinned", run("sessions", "pin", i))
        self.assertIn("pinned", run("sessions"))
        self.assertNotIn("pinned", run("sessions", "unpin", i))
        file = self.state / "export"
        run("sessions", "export", i, str(file))
        self.assertEqual(s.SessionExport.FromString(file.read_bytes()).messages[0].parts[0].text, "Hello.")
        self.assertEqual(json.loads(run("--json", "sessions", "export", i))["messages"][0]["parts"][0]["text"], "Hello.")
        code = ("import sys; sys.path.insert(0, sys.argv[1]); from deltad import Client, Session\n"
                "with Client(sys.argv[2]) as c:\n"
                "    x = Session(c, sys.argv[3])\n"
                "    assert x.pin().pinned and not x.pin(unpin=True).pinned\n"
                "    y = c.import_session(x.export(with_sampled=True))\n"
                "    assert y.get(with_messages=True).messages == x.get(with_messages=True).messages\n")
        subprocess.run([sys.executable, "-c", code, daemon.SOURCE / "clients/python", self.d.address, i], check=True,
                       env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})


if __name__ == "__main__":
    unittest.main()
