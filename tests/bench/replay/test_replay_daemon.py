"""replay against the daemon on the demo model: that the figures fit together, not that they are good."""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "support"))
import daemon  # noqa: E402

TURNS, CONVERSATIONS = 5, 2


def replay(*arguments):
    return subprocess.run([sys.executable, "-B", HERE / "replay", *map(str, arguments)], capture_output=True, text=True, timeout=300)


class Played(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.path = pathlib.Path(cls.folder.name) / "t.jsonl"
        r = replay("generate", "--scale", 1 / 48, "--max-context", 3000, "--turns", TURNS, "--conversations", CONVERSATIONS, "--loop", 2,
                   "--bytes-per-token", 3.6, "--out", cls.path)
        assert r.returncode == 0, r.stderr
        cls.d = daemon.Daemon(tcp=True)

    @classmethod
    def tearDownClass(cls):
        cls.d.stop()
        cls.folder.cleanup()

    def run_it(self, *arguments, target=None):
        out = pathlib.Path(self.folder.name) / "out.json"
        r = replay("run", self.path, "--target", target or f"unix:{self.d.socket}", "--max-tokens", 12, "--json", out, *arguments)
        self.assertEqual(r.returncode, 0, r.stdout + r.stderr)
        self.assertIn("reprocessed", r.stdout)
        figures = json.loads(out.read_text())
        turns, total = figures["turns"], figures["summary"]
        self.assertEqual([(t["conversation"], t["turn"]) for t in turns],
                         [(f"c{c}", i) for c in range(CONVERSATIONS) for i in range(TURNS)])
        for t in turns:
            self.assertLessEqual(t["cached"], t["prompt"])
            self.assertLessEqual(t["new"], t["prompt"])
            self.assertEqual(t["reprocessed"], max(t["prompt"] - t["cached"] - t["new"], 0))
            self.assertGreater(t["new"], 0)
            self.assertGreater(t["completion"], 0)
            self.assertLessEqual(t["completion"], 12)
            self.assertLessEqual(len(t["arrivals_s"]), t["completion"])
            self.assertEqual(t["arrivals_s"], sorted(t["arrivals_s"]))
            self.assertEqual(t["first_s"], t["arrivals_s"][0])
            self.assertLessEqual(t["arrivals_s"][-1], t["total_s"])
            self.assertLessEqual(t["server_first_s"], t["first_s"] + 0.05)
            self.assertEqual(t["error"], "")
        for name in ("prompt", "cached", "new", "reprocessed"):
            self.assertEqual(total[f"{name}_tokens"], sum(t[name] for t in turns))
        self.assertEqual(total["output_tokens"], sum(t["completion"] for t in turns))
        self.assertEqual((total["turns"], total["failed"]), (len(turns), 0))
        self.assertEqual(total["cold_first_token"]["n"] + total["warm_first_token"]["n"], len(turns))
        return figures, r

    def test_recorded_answers(self):
        chat, _ = self.run_it("--mode", "chat", "--fresh", "a")
        session, _ = self.run_it("--mode", "session", "--fresh", "b")
        self.assertEqual(chat["turns"][0]["cached"], 0)
        for figures in (chat, session):
            # the end of the turn does not end them
            self.assertTrue(all(t["completion"] <= 12 and t["reason"] == "length" for t in figures["turns"]))
            self.assertGreater(figures["summary"]["cached_tokens"], 0)
        # the same prompts until the template takes reasoning out of one
        for c in range(CONVERSATIONS):
            a, b = chat["turns"][c * TURNS], session["turns"][c * TURNS]
            self.assertEqual(a["prompt"], b["prompt"])

    def test_live_answers_at_once(self):
        session, _ = self.run_it("--mode", "session", "--live", "--concurrency", CONVERSATIONS, "--fresh", "c")
        before = None
        for t in session["turns"]:
            if t["turn"]:  # a session's timeline goes on behind prompt and answer
                self.assertGreater(t["prompt"], before["prompt"] + before["completion"] - 1)
                self.assertEqual(t["new"], t["prompt"] - before["prompt"] - before["completion"] + 1)
            before = t
        self.run_it("--mode", "chat", "--live", "--concurrency", CONVERSATIONS, "--fresh", "d", target=self.d.tcp_address)

    def test_the_cache_bypassed(self):
        figures, _ = self.run_it("--cache-bypass")
        self.assertEqual(figures["summary"]["cached_tokens"], 0)
        for t in figures["turns"]:
            self.assertEqual(t["reprocessed"], t["prompt"] - t["new"])

    def test_a_warm_start_is_told(self):
        self.run_it("--fresh", "e")
        _, r = self.run_it("--fresh", "e")
        self.assertIn("the cache was warm", r.stdout)

    def test_interference(self):
        out = pathlib.Path(self.folder.name) / "interfere.json"
        r = replay("interfere", "--target", f"unix:{self.d.socket}", "--streams", 2, "--prompt-tokens", 1500, "--repeat", 2, "--settle", 0.3,
                   "--json", out)
        self.assertEqual(r.returncode, 0, r.stdout + r.stderr)
        a = json.loads(out.read_text())["summary"]
        self.assertEqual((a["streams"], len(a["cold"]), a["longest_during"]["n"]), (2, 2, 4))
        for cold in [a["alone"], *a["cold"]]:
            self.assertTrue(1200 < cold["prompt_tokens"] < 1800, cold)
            self.assertLess(cold["cached_tokens"], 64)
        for name in ("gap_quiet", "gap_during"):
            self.assertGreater(a[name]["n"], 0)
            self.assertTrue(0 <= a[name]["p50_s"] <= a[name]["p99_s"] <= a[name]["max_s"])
        r = replay("interfere", "--target", f"unix:{self.d.socket}", "--streams", 1, "--prompt-tokens", 1500, "--stream-tokens", 20)
        self.assertEqual(r.returncode, 2)
        self.assertIn("raise --stream-tokens", r.stderr)

    def test_nobody_there(self):
        r = replay("run", self.path, "--target", f"unix:{self.folder.name}/none.sock")
        self.assertEqual(r.returncode, 2)
        self.assertIn("is deltad running there?", r.stderr)


if __name__ == "__main__":
    unittest.main()
