"""A checkpoint made up at the demo model's shape: it opens, the daemon answers with it, and `replay start` and `replay measure` tell
what fits together. Figures of speed are not looked at."""
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))
import daemon  # noqa: E402

MAKE = daemon.BUILD / "tests/bench_checkpoint"
REPLAY = [sys.executable, "-B", HERE / "replay/replay"]


def run(*arguments):
    return subprocess.run([str(x) for x in arguments], capture_output=True, text=True, timeout=300)


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


class Checkpoint(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.root = pathlib.Path(cls.folder.name)
        cls.model = cls.root / "model"
        r = run(MAKE, cls.model, "--shape", daemon.DEMO_MODEL, "--threads", 3)
        assert r.returncode == 0, r.stderr

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def test_it_is_what_the_demo_model_is(self):
        r, demo = (run(daemon.BUILD / "engine/delta-inspect", m) for m in (self.model, daemon.DEMO_MODEL))
        self.assertEqual(r.returncode, 0, r.stderr)
        same = lambda text: [x for x in text.splitlines() if x.split()[0] in
                             ("layers", "hidden", "attention", "rope", "DeltaNet", "experts", "weights", "template")]
        self.assertEqual(same(r.stdout), same(demo.stdout))

    def test_threads_change_no_byte(self):
        again = self.root / "again"
        self.assertEqual(run(MAKE, again, "--shape", daemon.DEMO_MODEL, "--threads", 1).returncode, 0)
        self.assertEqual(digest(again), digest(self.model))

    def test_what_is_missing_is_told(self):
        self.assertEqual(run(MAKE).returncode, 64)
        self.assertEqual(run(MAKE, self.root / "x", "--threads", 0).returncode, 64)
        r = run(MAKE, "/proc/here")
        self.assertEqual(r.returncode, 1)
        self.assertIn("/proc/here", r.stderr)
        small = pathlib.Path("/dev/shm")  # 37 GB do not fit, unless they do
        v = os.statvfs(small)
        if v.f_bavail * v.f_frsize < 30e9:
            with tempfile.TemporaryDirectory(dir=small) as folder:
                r = run(MAKE, folder)
                self.assertEqual(r.returncode, 1)
                self.assertRegex(r.stderr, r"GB free, 36\.\d GB are needed|GB free, 37\.\d GB are needed")
                self.assertFalse(list(pathlib.Path(folder).glob("*.safetensors")))

    def test_start(self):
        socket = self.root / "start.sock"
        r = run(*REPLAY, "start", "--repeat", 2, "--target", f"unix:{socket}", "--log", self.root / "log", "--", daemon.BUILD / "daemon/deltad",
                "--backend", "cpu", "--model", self.model, "--socket", socket, "--ttrpc-socket", self.root / "start-ttrpc.sock")
        self.assertEqual(r.returncode, 0, r.stderr + (self.root / "log").read_text())
        ready, first = ([float(x) for x in line.split()[-2:]] for line in r.stdout.splitlines()[-2:])
        for a, b in zip(ready, first):
            self.assertTrue(0 < a <= b < 60, r.stdout)
        r = run(*REPLAY, "start", "--target", f"unix:{socket}", "--", daemon.BUILD / "daemon/deltad", "--model", self.root,
                "--socket", socket, "--ttrpc-socket", self.root / "start-ttrpc.sock")
        self.assertEqual(r.returncode, 2)
        self.assertIn("ended with 78", r.stderr)

    def test_measure(self):
        out = self.root / "measured.json"
        with daemon.Daemon(model={"path": self.model, "backend": "cpu"}) as d:
            r = run(*REPLAY, "measure", "warm", "fork", "switch", "decode", "--target", f"unix:{d.socket}", "--context", 700, "--new", 100,
                    "--copies", 3, "--repeat", 3, "--streams", "1,3", "--tokens", 300, "--pid", d.process.pid, "--json", out)
            self.assertEqual(r.returncode, 0, r.stderr)
        a = json.loads(out.read_text())
        for what in ("warm", "fork", "switch"):
            self.assertTrue(600 < a[what]["700"]["cold"]["prompt_tokens"] < 800, a[what])
        self.assertTrue(all(80 < n < 130 for n in a["warm"]["700"]["computed"] + a["switch"]["700"]["computed"]), a)
        self.assertEqual(len(a["switch"]["700"]["computed"]), 6)
        self.assertEqual(a["fork"]["700"]["call"]["n"], 3)
        self.assertTrue(len(a["fork"]["700"]["computed"]) == 9 and max(a["fork"]["700"]["computed"]) < 100, a["fork"])
        for n in ("1", "3"):
            self.assertGreater(a["decode"][n]["tokens_per_s"], 0)
            self.assertGreater(a["decode"][n]["cpu_s_a_token"], 0)
            self.assertGreaterEqual(a["decode"][n]["gap"]["n"], 100)

    def test_the_cpu_keeps_keys_and_values_one_way(self):
        folder = self.root / "fp8"
        folder.mkdir()
        (folder / "c").write_text(f"[model]\npath = {self.model}\nbackend = cpu\nkv_type = fp8\n[server]\nsocket = {folder}/s\nttrpc_socket =\n")
        r = run(daemon.BUILD / "daemon/deltad", "--config", folder / "c")
        self.assertEqual(r.returncode, 78)
        self.assertIn("kv_type auto", r.stdout + r.stderr)


if __name__ == "__main__":
    unittest.main()
