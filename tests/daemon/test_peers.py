"""Who may touch what, over real sockets: users and groups as the kernel tells them, and TCP, where nobody is known."""
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support.daemon import Daemon, grpc, module  # noqa: E402

PROTO = "deltad/v1/session.proto"
ADMIN_GROUP = "daemon"  # any that every system has, and nobody is in
CLIENT = """
import sys, grpc
c = grpc.insecure_channel(sys.argv[1])
for method in sys.argv[2:]:
    name, data = method.split(":")
    try:
        answer = c.unary_unary("/deltad.v1.SessionService/" + name)(bytes.fromhex(data), timeout=20)
        print("OK", len(answer))
    except grpc.RpcError as e:
        print(e.code().name)
"""


@unittest.skipUnless(os.geteuid() == 0, "only root can be others")
class Users(unittest.TestCase):
    def ask(self, d, calls, user, groups=()):
        r = subprocess.run([sys.executable, "-c", CLIENT, d.address,
                            *(f"{name}:{message.SerializeToString().hex()}" for name, message in calls)],
                           user=user, group=user, extra_groups=groups, capture_output=True, text=True, timeout=60,
                           cwd="/")
        self.assertEqual(r.returncode, 0, r.stderr)
        return [line.split()[0] for line in r.stdout.splitlines()]

    def test_groups_are_those_of_the_process_that_connected(self):
        import grp
        admin = grp.getgrnam(ADMIN_GROUP).gr_gid
        s = module(PROTO)
        with Daemon(server={"socket_mode": "0666"}, policy={"admin_group": ADMIN_GROUP}) as d:
            d.folder.chmod(0o755)
            mine = d.stub(PROTO, "SessionService").CreateSession(s.CreateSessionRequest(), timeout=20).session.id
            calls = [("ListSessions", s.ListSessionsRequest(all_users=True)),
                     ("GetSession", s.GetSessionRequest(session_id=mine)),
                     ("CloseSession", s.CloseSessionRequest(session_id=mine))]
            self.assertEqual(self.ask(d, calls, 54321), ["PERMISSION_DENIED", "NOT_FOUND", "NOT_FOUND"])
            self.assertEqual(self.ask(d, calls, 54321, [54322, admin, 54323]), ["OK", "OK", "OK"])
            self.assertEqual(self.ask(d, calls, 54321, [admin])[1:], ["NOT_FOUND", "NOT_FOUND"])  # it is closed


    def test_saves_are_of_the_user_who_connected(self):
        s = module(PROTO)
        with tempfile.TemporaryDirectory() as state, \
                Daemon(server={"socket_mode": "0666"}, state={"directory": state}) as d:
            d.folder.chmod(0o755)
            sessions = d.stub(PROTO, "SessionService")
            hello = module("deltad/v1/types.proto").Message(role=2, parts=[{"text": "Hello."}])
            mine = sessions.CreateSession(s.CreateSessionRequest(messages=[hello]), timeout=20).session.id
            sessions.SaveSession(s.SaveSessionRequest(session_id=mine, name="x"), timeout=20)
            calls = [("SaveSession", s.SaveSessionRequest(session_id=mine, name="y")),
                     ("RestoreSession", s.RestoreSessionRequest(name="x")),
                     ("DeleteSave", s.DeleteSaveRequest(name="x")),
                     ("ListSaves", s.ListSavesRequest())]
            self.assertEqual(self.ask(d, calls, 54321), ["NOT_FOUND", "NOT_FOUND", "NOT_FOUND", "OK"])
            self.assertEqual([x.name for x in sessions.ListSaves(s.ListSavesRequest(), timeout=20).saves], ["x"])
            self.assertTrue(sessions.RestoreSession(s.RestoreSessionRequest(name="x"), timeout=20).session.id)


class Tcp(unittest.TestCase):
    def test_saves_are_for_users(self):
        s = module(PROTO)
        with Daemon(tcp=True) as d:
            a = d.stub(PROTO, "SessionService", d.channel(d.tcp_address))
            with self.assertRaises(grpc.RpcError) as e:
                a.ListSaves(s.ListSavesRequest(), timeout=20)
            self.assertEqual(e.exception.code(), grpc.StatusCode.PERMISSION_DENIED)

    def test_a_session_is_for_who_holds_its_id(self):
        s = module(PROTO)
        with Daemon(tcp=True) as d:
            unix = d.stub(PROTO, "SessionService")
            a, b = (d.stub(PROTO, "SessionService", d.channel(d.tcp_address)) for _ in range(2))
            theirs = unix.CreateSession(s.CreateSessionRequest(), timeout=20).session.id
            mine = a.CreateSession(s.CreateSessionRequest(), timeout=20).session.id
            self.assertEqual([x.id for x in a.ListSessions(s.ListSessionsRequest(), timeout=20).sessions], [mine])
            self.assertEqual(len(b.ListSessions(s.ListSessionsRequest(), timeout=20).sessions), 0)
            with self.assertRaises(grpc.RpcError) as e:
                b.ListSessions(s.ListSessionsRequest(all_users=True), timeout=20)
            self.assertEqual(e.exception.code(), grpc.StatusCode.PERMISSION_DENIED)
            with self.assertRaises(grpc.RpcError) as e:
                b.CloseSession(s.CloseSessionRequest(session_id=theirs), timeout=20)
            self.assertEqual(e.exception.code(), grpc.StatusCode.NOT_FOUND)
            self.assertEqual(b.GetSession(s.GetSessionRequest(session_id=mine), timeout=20).session.id, mine)
            b.CloseSession(s.CloseSessionRequest(session_id=mine), timeout=20)


if __name__ == "__main__":
    unittest.main()
