"""Saves: a session goes on from a file as the one that was saved does, for its owner alone; what is wrong with a file is told."""
import os
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
from test_end_to_end import gather, message, request  # noqa: E402

t = m = s = None
LONG = "The quick brown fox jumps over the lazy dog. " * 40


def setUpModule():
    global t, m, s
    t, m, s = end_to_end.load_modules()


class Saves(end_to_end.WithState):
    def folder(self):
        return self.state / "saves" / str(os.geteuid())

    def turn(self, i, text, **more):
        more.setdefault("max_tokens", 16)
        return gather(self.inference.Chat(request([message("user", text)], session_id=i, **more)))

    def create(self):
        i = self.sessions.CreateSession(s.CreateSessionRequest(name="one", messages=[message("user", LONG)])).session.id
        self.turn(i, "Go on.")
        return i

    def save(self, i, name="here"):
        return self.sessions.SaveSession(s.SaveSessionRequest(session_id=i, name=name))

    def restore(self, name="here"):
        return self.sessions.RestoreSession(s.RestoreSessionRequest(name=name))

    def fails(self, code, reason, call, *args):
        with self.assertRaises(grpc.RpcError) as e:
            call(*args)
        self.assertEqual((e.exception.code(), reason in str(e.exception.details())), (code, True), e.exception)
        return e.exception

    def test_a_restored_session_goes_on_as_the_saved_one(self):
        self.start()
        i = self.create()
        saved = self.save(i)
        path = self.folder() / "here.save"
        self.assertEqual(path.stat().st_size, saved.save.bytes)
        self.assertEqual((path.stat().st_mode & 0o777, self.folder().stat().st_mode & 0o777), (0o600, 0o700))
        self.assertGreater(saved.n_tokens, 300)
        self.assertEqual([x.name for x in self.sessions.ListSaves(s.ListSavesRequest()).saves], ["here"])
        want = [self.turn(i, x) for x in ("And on?", "Why?")]
        for kill in (None, False, True):
            if kill is not None:
                if kill:
                    self.d.process.send_signal(signal.SIGKILL)
                    self.d.process.wait()
                self.d.stop()
                shutil.rmtree(self.state / "cache")
                self.start()
            for _ in range(2):  # as often as one likes
                r = self.restore()
                self.assertEqual((r.n_tokens, r.session.name), (saved.n_tokens, "one"))
                self.assertNotEqual(r.session.id, i)
                got = [self.turn(r.session.id, x) for x in ("And on?", "Why?")]
                self.assertEqual([x["text"] for x in got], [x["text"] for x in want])
                if kill is not None:
                    self.assertGreaterEqual(got[0]["finished"].usage.cached_tokens, saved.n_tokens)
        self.sessions.DeleteSave(s.DeleteSaveRequest(name="here"))
        self.fails(grpc.StatusCode.NOT_FOUND, "no save", self.restore)
        self.fails(grpc.StatusCode.NOT_FOUND, "no save", self.sessions.DeleteSave, s.DeleteSaveRequest(name="here"))

    def test_a_restored_session_needs_its_save_no_more(self):
        self.start()
        self.save(self.create())
        self.d.stop()
        shutil.rmtree(self.state / "cache")
        self.start(cache={"disk_idle": "50ms"})
        i = self.restore().session.id
        usage = self.turn(i, "And on?")["finished"].usage
        self.assertGreater(usage.cached_tokens, 300, usage)
        self.sessions.DeleteSave(s.DeleteSaveRequest(name="here"))
        self.d.wait_until(lambda: any((self.state / "cache").glob("*.state")))
        time.sleep(1)  # for what else there is to write
        self.d.process.send_signal(signal.SIGKILL)
        self.d.process.wait()
        self.d.stop()
        self.start()
        usage = self.turn(i, "Why?")["finished"].usage
        self.assertLess(usage.prompt_tokens - usage.cached_tokens, 60, usage)

    def test_names_limits_and_preconditions(self):
        self.start(limits={"saved_bytes": "1M"})
        i = self.create()
        for name in ("", ".x", "a/b", "..", "x" * 65, "ä"):
            self.fails(grpc.StatusCode.INVALID_ARGUMENT, "A-Za-z0-9", self.save, i, name)
        self.fails(grpc.StatusCode.NOT_FOUND, "", self.save, "none")
        e = self.fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "limits.saved_bytes", self.save, i)
        self.assertIn("deltactl saves delete", e.details())
        self.assertEqual(list(self.folder().iterdir()), [])
        self.d.stop()
        self.start()
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "take a turn", self.save, i)
        self.turn(i, "Still there?")
        self.save(i, "a")
        self.save(i, "a")
        self.save(i, "b")
        self.assertEqual(sorted(x.name for x in self.sessions.ListSaves(s.ListSavesRequest()).saves), ["a", "b"])
        self.d.stop()
        self.start(cache={"disk_bytes": 0})
        self.turn(i, "And now?")
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "no cache on disk", self.save, i)

    def test_what_is_damaged_or_of_another_model_is_told(self):
        self.start()
        i = self.create()
        self.save(i)
        path = self.folder() / "here.save"
        whole = path.read_bytes()
        sessions = len(self.sessions.ListSessions(s.ListSessionsRequest()).sessions)
        at = whole.index(b"deltad state 1\n")
        for where in (3, 200, at + 20 * 8 + 100, at + 5000, len(whole) // 2, len(whole) - 3):
            bad = bytearray(whole)
            bad[where] ^= 16
            for text in (bytes(bad), whole[:where]):
                path.write_bytes(text)
                e = self.fails(grpc.StatusCode.DATA_LOSS, str(path), self.restore)
                self.assertIn("offset", e.details())
        other = bytearray(whole)
        other[at + 16] ^= 1  # the model; the sum of the head is another now, too
        path.write_bytes(other)
        self.fails(grpc.StatusCode.DATA_LOSS, str(path), self.restore)
        self.assertEqual(len(self.sessions.ListSessions(s.ListSessionsRequest()).sessions), sessions)
        path.write_bytes(whole)
        self.restore()
        # The same words with other weights: the shards' times tell.
        model = self.state / "model"
        shutil.copytree(daemon.SOURCE / "engine/demo-model/w8a16", model / "w8a16", copy_function=shutil.copyfile)
        self.d.stop()
        self.start(model={"path": model / "w8a16"})
        e = self.fails(grpc.StatusCode.FAILED_PRECONDITION, " on cpu (", self.restore)
        self.assertEqual(e.details().count(" on cpu ("), 2, e.details())
        self.assertTrue(self.turn(self.sessions.CreateSession(s.CreateSessionRequest()).session.id, "Hi.")["text"])

    def test_a_full_disk_leaves_the_old_save(self):
        self.start()
        i = self.create()
        self.save(i)
        before = (self.folder() / "here.save").read_bytes()
        self.d.stop()
        self.start(wrap=["prlimit", f"--fsize={len(before) - 5000}"])
        self.turn(i, LONG)
        self.fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "File too large", self.save, i)
        self.assertEqual((self.folder() / "here.save").read_bytes(), before)
        self.assertEqual(self.restore().session.name, "one")

    def test_deltactl(self):
        self.start()
        i = self.create()

        def ctl(*args, code=0):
            out = subprocess.run([daemon.BUILD / "clients/deltactl", "--socket", self.d.ttrpc, *args],
                                 capture_output=True, text=True, timeout=60)
            self.assertEqual(out.returncode, code, out)
            return out.stdout
        self.assertRegex(ctl("save", i, "x"), r"^x: \d+ tokens, \d+\.\d MB\n$")
        self.assertIn("x ", ctl("saves"))
        self.assertIn("one", ctl("restore", "x"))
        ctl("saves", "delete", "x")
        self.assertEqual(ctl("saves"), "no saves\n")
        ctl("restore", "x", code=1)
        ctl("save", i, code=64)


if __name__ == "__main__":
    unittest.main()
