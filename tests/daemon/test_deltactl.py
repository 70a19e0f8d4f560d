#!/usr/bin/python3
"""deltactl as a person uses it: in a terminal (a pty), in a pipe, and where there is no daemon."""
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))
import daemon  # noqa: E402

CTL = daemon.BUILD / "clients/deltactl"


class Terminal:
    """deltactl with a terminal of its own."""

    def __init__(self, *arguments, **env):
        self.home = tempfile.TemporaryDirectory()
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update({"XDG_STATE_HOME": self.home.name, "TERM": "xterm", **env})
            os.execv(CTL, [str(CTL), *map(str, arguments)])

    def type(self, text):
        os.write(self.fd, text.encode())

    def wait_for(self, text, timeout=30):
        """What was written up to text; it is taken away."""
        end = time.monotonic() + timeout
        while text not in self.seen:
            if time.monotonic() > end or not self.read(1):
                raise TimeoutError(f"no {text!r} in {self.seen!r}")
        before, self.seen = self.seen.split(text, 1)
        return before

    def read(self, seconds):
        if not select.select([self.fd], [], [], seconds)[0]:
            return True
        try:
            piece = os.read(self.fd, 65536)
        except OSError:
            return False  # it ended
        self.seen += piece.decode(errors="replace")
        return bool(piece)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)
        self.home.cleanup()

    def status(self):
        while self.read(10):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid, code = 0, os.waitstatus_to_exitcode(status)
        return code


def run(*arguments, **options):
    return subprocess.run([CTL, *arguments], capture_output=True, text=True, timeout=60, **options)


class Ctl(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.d = daemon.Daemon()

    @classmethod
    def tearDownClass(cls):
        cls.d.stop()

    def ctl(self, *arguments, **options):
        return run("--socket", self.d.ttrpc, *arguments, **options)

    def sessions(self):
        return len(self.ctl("--json", "sessions").stdout.splitlines())

    def test_a_conversation_in_a_terminal(self):
        with Terminal("--socket", self.d.ttrpc, "chat", "--temperature", 0) as t:
            t.wait_for("> ")
            t.type("What color is the sky?\r")
            t.wait_for("\x1b[2m")  # thinking is dimmed
            t.wait_for("blue")
            t.wait_for("> ")
            t.type("one\rtwo\r")  # a paste: one message
            t.wait_for("> ")
            self.assertEqual(self.sessions(), 1)
            got = self.ctl("--json", "sessions").stdout
            self.assertIn('"n_messages": 4', got)
            t.type("\x04")
            self.assertEqual(t.status(), 0)
        self.assertEqual(self.sessions(), 0)

    def test_interrupt_ends_the_answer_and_not_the_program(self):
        with Terminal("--socket", self.d.ttrpc, "chat", "--no-think", "--ignore-eos", "--max-tokens", 30000) as t:
            t.wait_for("> ")
            t.type("tell me a story\r")
            t.wait_for("\n")
            time.sleep(0.5)
            t.type("\x03")
            t.wait_for("[cancelled]")
            t.wait_for("> ")
            t.type("half a line")
            t.wait_for("half a line")
            time.sleep(0.3)  # it reads again; an interrupt in between would wait for the next key
            t.type("\x03")  # at the prompt: the line is dropped
            t.wait_for("> ")
            t.type("/quit\r")
            self.assertEqual(t.status(), 0)

    def test_no_color_where_none_is_wanted(self):
        for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            with Terminal("--socket", self.d.ttrpc, "chat", "-p", "hello", "--temperature", 0, **env) as t:
                self.assertEqual(t.status(), 0)
                self.assertNotIn("\x1b", t.seen)

    def test_control_characters_of_a_model_do_not_reach_the_terminal(self):
        ids = self.ctl("tokenize", "a\x1b]0;x\x07b").stdout.split()
        with Terminal("--socket", self.d.ttrpc, "detokenize", *ids) as t:
            self.assertEqual(t.status(), 0)
            self.assertEqual(t.seen.strip(), "a\ufffd]0;x\ufffdb")
        self.assertEqual(self.ctl("detokenize", *ids).stdout, "a\x1b]0;x\x07b\n")

    def test_a_pipe_gets_the_answer_alone(self):
        r = self.ctl("chat", "--no-think", "--temperature", "0", "--max-tokens", "3", "-p", "tell me a story")
        self.assertEqual(r.returncode, 0)
        self.assertEqual(len(r.stdout.splitlines()), 1, r.stdout)
        self.assertIn("[cut: the answer reached its token limit]", r.stderr)
        r = self.ctl("chat", "--no-think", "--temperature", "0", input="hello\nWhat color is the sky?\n")
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        self.assertIn("blue", r.stdout.splitlines()[1])
        r = self.ctl("chat", "--temperature", "-1", input="hello\nhello\n")
        self.assertEqual((r.returncode, r.stdout), (1, ""))
        self.assertEqual(r.stderr.count("INVALID_ARGUMENT"), 1)  # the first failure ends it

    def test_a_session_goes_on_with_its_id(self):
        with Terminal("--socket", self.d.ttrpc, "chat", "--no-think") as t:
            t.wait_for("> ")
            t.type("hello\r")
            t.wait_for("\n")
            t.wait_for("> ")
            line = self.ctl("sessions").stdout.splitlines()[1]
            r = self.ctl("chat", "--no-think", "--session", line.split()[0], input="hello\n")
            self.assertEqual(r.returncode, 0, r.stderr)
            self.assertEqual(self.sessions(), 1)  # not closed: it is another's
            self.assertIn('"generation": 2', self.ctl("--json", "sessions").stdout)
        r = self.ctl("sessions", "close", line.split()[0])
        self.assertEqual(r.returncode, 0, r.stderr)
        self.assertEqual(self.ctl("sessions").stdout, "no sessions\n")

    def test_an_interrupted_generate_says_nothing(self):
        """Wherever the signal meets it: waiting, or printing what came."""
        for at in range(12):
            p = subprocess.Popen([CTL, "--socket", self.d.ttrpc, "generate", "-p", "Once", "--ignore-eos", "--max-tokens", "30000"],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            p.stdout.read(5 + at)
            time.sleep(at * 0.0003)
            p.send_signal(signal.SIGINT)
            _, told = p.communicate(timeout=30)
            self.assertEqual((p.returncode, told), (130, ""))

    def test_wrong_usage_is_64_and_says_what_would_be_right(self):
        for arguments, told in ((["chat", "hello"], "after -p"), (["detokenize"], "one id or more"), (["tokenize", "--foo"], "--foo"),
                                (["--socket"], "needs a path"), (["what"], "deltactl --help"), (["chat", "--top-k", "x"], "--top-k")):
            r = run(*arguments)
            self.assertEqual((r.returncode, r.stdout), (64, ""), arguments)
            self.assertIn(told, r.stderr)
        for arguments in (["--help"], ["chat", "--help"], ["tokenize", "-h"]):
            r = run(*arguments)
            self.assertEqual((r.returncode, r.stderr), (0, ""))
            self.assertTrue(r.stdout.startswith("usage: deltactl"))

    def test_without_a_daemon_it_says_what_to_do(self):
        r = run("--socket", "/nowhere/x", "status")
        self.assertEqual((r.returncode, r.stdout), (69, ""))
        self.assertIn("systemctl start deltad", r.stderr)
        r = run("--json", "--socket", "/nowhere/x", "status")
        self.assertEqual(r.returncode, 69)
        self.assertIn('"code": "UNAVAILABLE"', r.stdout)


if __name__ == "__main__":
    unittest.main()
