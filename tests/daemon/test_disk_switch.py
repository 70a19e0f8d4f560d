"""Sessions that fit one at a time change places through the disk: none waits for ever, none is computed twice, and
each says what it would have said alone."""
import pathlib
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
from test_end_to_end import MODEL, gather, message, request  # noqa: E402
import test_end_to_end as end_to_end  # noqa: E402
import test_prefix_cache as cached  # noqa: E402


def setUpModule():
    cached.setUpModule()


class Switch(unittest.TestCase):
    def change(self, directory, idle, pause):
        s = cached.s
        with daemon.Daemon(model={"max_sessions": 4, "kv_tokens": 2112, "ctx_max": 2112}, state={"directory": directory},
                           cache={"disk_idle": idle, "disk_bytes": "1G", "ahead": "no"}) as d:
            inference, sessions = d.stub(end_to_end.INFERENCE, "InferenceService"), d.stub(end_to_end.SESSION, "SessionService")
            model = d.stub(MODEL, "ModelService")
            stats = lambda: model.GetStats(daemon.module(MODEL).GetStatsRequest()).cache
            ids, said = [], {}
            for k in range(3):
                first = message("user", cached.text(700, 100 + k))
                ids.append(sessions.CreateSession(s.CreateSessionRequest(messages=[first])).session.id)
                time.sleep(pause)
            begun = stats()
            for turn in range(4):
                for k, i in enumerate(ids):
                    out = gather(inference.Chat(request([message("user", cached.text(9, k + turn))], session_id=i, max_tokens=8),
                                                timeout=60))
                    said[k, turn] = out["text"]
                    time.sleep(pause)
            done = stats()
            return said, done.tokens_computed - begun.tokens_computed, done.disk_reads

    def test_each_finds_its_state_again(self):
        with tempfile.TemporaryDirectory(prefix="deltad-state-") as f:
            said, computed, reads = self.change(f, "50ms", 0.4)
        self.assertLess(computed, 12 * 60)  # of 3 x 4 turns behind some 1,000 tokens
        self.assertGreater(reads, 8)
        # one that comes while states are written waits for that, and no longer
        with tempfile.TemporaryDirectory(prefix="deltad-state-") as f:
            hurried, _, _ = self.change(f, "1ms", 0)
        self.assertEqual(hurried, said)


if __name__ == "__main__":
    unittest.main(verbosity=1)
