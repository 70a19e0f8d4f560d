"""deltactl parse --jsonl on the public cases (tests/unit/chat/cases): each whole, byte by byte, cut in two at
every place and at random cuts; all say the same, and what was streamed is what came out."""
import base64
import json
import os
import pathlib
import random
import subprocess
import unittest

SOURCE = pathlib.Path(os.environ.get("DELTA_SOURCE", pathlib.Path(__file__).resolve().parents[2]))
DELTACTL = pathlib.Path(os.environ.get("DELTA_BUILD", SOURCE / "build")) / "clients/deltactl"
CASES = SOURCE / "tests/unit/chat/cases"
TOOLS = json.loads((CASES / "tools.json").read_text())


OPTIONS = ("id", "thinking", "tool_choice", "finish", "calls_in_reasoning", "calls_in_fences", "unknown_tools")


def parse(lines, *args):
    done = subprocess.run([DELTACTL, "parse", "--jsonl", *args], input="".join(lines).encode(), capture_output=True,
                          timeout=300)
    return done, [json.loads(x) for x in done.stdout.decode("ascii").split("\n") if x]


def line(case, cuts):
    data = case["text"].encode()
    places = [0, *sorted(cuts), len(data)]
    chunks = [base64.b64encode(data[a:b]).decode() for a, b in zip(places, places[1:])]
    what = {k: case[k] for k in OPTIONS if k in case}
    return json.dumps({**what, "tools": TOOLS[case.get("tools", "common")], "chunks": chunks}) + "\n"


def cuts_of(n, dice):
    yield []
    yield range(1, n)
    for at in range(1, n):
        yield [at]
    for _ in range(8):
        yield dice.sample(range(1, n), dice.randint(0, min(n - 1, 12))) if n > 1 else []


class Cases(unittest.TestCase):
    def test_every_case_at_every_cut(self):
        dice = random.Random(3)
        n = 0
        for path in sorted(CASES.glob("*.jsonl")):
            for case in map(json.loads, path.read_text().splitlines()):
                want = case["expect"]
                lines = [line(case, cuts) for cuts in cuts_of(len(case["text"].encode()), dice)]
                done, answers = parse(lines)
                self.assertEqual((done.returncode, len(answers)), (0, len(lines)), done.stderr)
                for asked, got in zip(lines, answers):
                    calls = [[c["name"], c["arguments"]] for c in got["tool_calls"]]
                    self.assertEqual({"reasoning": got["reasoning"], "content": got["content"], "tool_calls": calls,
                                      "finish_reason": got["finish_reason"]}, want, (case["id"], asked))
                    self.assertEqual(["".join(d) for d in got["args_deltas"]], [c[1] for c in calls], case["id"])
                    for _, arguments in calls:
                        json.loads(arguments)
                n += len(lines)
        self.assertGreater(n, 10000)

    def test_a_string_is_streamed_while_it_is_written(self):
        text = "<tool_call>\n<function=f>\n<parameter=s>\n" + "word " * 100 + "\n</parameter>\n</function>\n</tool_call>"
        _, (got,) = parse([line({"id": 1, "text": text}, range(1, len(text)))])
        self.assertGreater(len(got["args_deltas"][0]), 400)

    def test_bad_lines_are_answered_and_the_next_is_read(self):
        good = line({"id": "g", "text": "hi"}, [])
        bad = ["{\n", "[1]\n", '{"id": 1}\n', '{"id": 2, "chunks": ["?"]}\n', '{"id": 3, "chunks": ["YQ=a"]}\n',
               '{"id": 4, "chunks": ["YQ"]}\n', '{"id": 5, "chunks": [], "finish": "x"}\n', '{"id": 6, "chunks": [1]}\n',
               '{"id": 7, "chunks": [], "tool_choice": "x"}\n', '{"id": 8, "chunks": [], "tools": [1]}\n',
               '{"id": 9, "chunks": [], "calls_in_fences": 1}\n', '{"id": 10, "chunks": [], "unknown_tools": "x"}\n']
        done, answers = parse([bad[0], good, "\n", *bad[1:], good])
        self.assertEqual(done.returncode, 1)
        self.assertEqual([a.get("id") for a in answers], [None, "g", None, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, "g"])
        for at, a in enumerate(answers):
            self.assertEqual("error" in a, a.get("id") != "g", a)
        self.assertIn("line 1:", answers[0]["error"])
        self.assertIn("line 4:", answers[2]["error"])
        done, _ = parse([], "/nowhere")
        self.assertEqual(done.returncode, 64)


if __name__ == "__main__":
    unittest.main()
