"""The rules of docs/TOOLS.md read a second time: a parser that sees the whole output at once, in plain Python,
against `deltactl parse --jsonl` on random texts made of the format's own pieces, in random cuts. Types of values are
left to the public cases: all parameters here are strings."""
import base64
import json
import os
import pathlib
import random
import re
import subprocess
import unittest

SOURCE = pathlib.Path(os.environ.get("DELTA_SOURCE", pathlib.Path(__file__).resolve().parents[2]))
DELTACTL = pathlib.Path(os.environ.get("DELTA_BUILD", SOURCE / "build")) / "clients/deltactl"
TOOLS = {"f": ["s", "t", "u"], "g": []}
ROUNDS = int(os.environ.get("DELTA_ROUNDS", "6000"))

PARAM = re.compile(r"<parameter=([^<>\n]+)>")
FUNCTION = re.compile(r"<function=([^\s\"'`{}<>]+)>")
CALL = re.compile(r"<tool_call>\s*" + FUNCTION.pattern)
BARE = re.compile(FUNCTION.pattern + r"(?=\s*(?:<parameter=|</function>))")
DRIFTED = re.compile(r"</param[^<>\n]{0,32}>?")
NEST = "<tool_call>\n<function="
TAGS = ("</function>", "</tool_call>", "</parameter>", "<tool_call>", "<function=", "<parameter=")
OPENERS = ("</tool_call>", "<tool_call>", "<function=")  # what may stand behind a </function>


def is_cut_tag(rest, tags=TAGS):
    """The turn ends inside one of these tags."""
    if any(tag.startswith(rest) for tag in tags):
        return True
    if rest.startswith("<parameter="):
        return "<parameter=" in tags and bool(re.fullmatch(r"[^<>\n]*", rest[11:]))
    rest = re.sub(r"^<tool_call>\s*", "", rest)
    return "<function=".startswith(rest) or bool(re.fullmatch(r"<function=[^\s\"'`{}<>]*", rest))


class Reader:
    def __init__(self, text, thinking, cut):
        self.text, self.at, self.cut = text, 0, cut
        self.parts = [[], []]  # reasoning, content: pieces of text; None where white space is nobody's
        self.kind = 0 if thinking else 1
        self.calls = []
        self.fence, self.line = None, ""

    # ---- the end of a value

    def skip(self, i):
        while i < len(self.text) and self.text[i].isspace():
            i += 1
        return i

    def function_holds(self, i):
        i = self.skip(i)
        t = self.text
        return (i == len(t) or t.startswith("</tool_call>", i) or CALL.match(t, i) or FUNCTION.match(t, i)
                or is_cut_tag(t[i:], OPENERS))

    def is_due(self, name):
        return name in TOOLS.get(self.name, []) and name not in self.used

    def closer_holds(self, i):
        t = self.text
        i = self.skip(i)
        if i == len(t) or t.startswith(("</tool_call>", "</parameter>"), i):
            return True
        if t.startswith("</function>", i):
            return self.function_holds(i + 11)
        m = CALL.match(t, i) or FUNCTION.match(t, i)
        if m:
            return m[1] in TOOLS
        if is_cut_tag(t[i:]):
            m = re.search(r"<function=(.*)$", t[i:])
            return not m or any(name.startswith(m[1]) for name in TOOLS)
        if t.startswith("<parameter=", i):
            m = PARAM.match(t, i)
            if m and self.is_due(m[1]):
                return True
            i = t.find("</parameter>", m.end() if m else i + 11)
            return i >= 0 and self.closer_holds(i + 12)
        return False

    def ends_unclosed(self, i, line_start):
        t = self.text
        if t.startswith("</function>", i):
            return self.function_holds(i + 11)
        if t.startswith("</tool_call>", i):
            i = self.skip(i + 12)
            return i == len(t) or bool(CALL.match(t, i))
        m = PARAM.match(t, i) if line_start else None
        return bool(m) and self.is_due(m[1])

    def value(self):
        """The text of a value, and whether it ended."""
        t, begin = self.text, self.at
        i, nest = begin, 0
        while (i := t.find("<", i)) >= 0:
            line_start = i == begin or t[i - 1] == "\n"
            if line_start and t.startswith(NEST, i):
                nest += 1
                i += len(NEST)
                continue
            if nest:
                if t.startswith("</tool_call>", i):
                    nest -= 1
                i += 1
                continue
            end = None
            if t.startswith("</parameter>", i):
                if self.closer_holds(i + 12):
                    end = i + 12
            else:
                m = DRIFTED.match(t, i)
                k = self.skip(m.end()) if m else 0
                if m and k < len(t) and self.ends_unclosed(k, t[k - 1] == "\n"):
                    end = m.end()
                elif self.ends_unclosed(i, line_start):
                    end = i
            if end is not None:
                self.at = end
                return t[begin:i].removeprefix("\n").removesuffix("\n"), True
            i += 1
        self.at = len(t)
        return "", False

    # ---- a call

    def call(self, name):
        self.name, self.used = name, {}
        t = self.text
        while True:
            self.at = i = self.skip(self.at)
            if i == len(t):
                return self.end(not self.cut)
            m = PARAM.match(t, i)
            if m:
                self.at = m.end()
                known = m[1] in self.used
                old = self.used.setdefault(m[1], None)
                value, ended = self.value()
                if not ended:
                    return self.end(False)
                self.used[m[1]] = old if known else value
                continue
            rest = t[i:]
            if len(rest) > 1 and ("<parameter=".startswith(rest) or re.fullmatch(r"<parameter=[^<>\n]*", rest)):
                self.at = len(t)
                return self.end(False)
            if t.startswith("</function>", i):
                self.at += 11
                return self.end(True)
            if t.startswith("</tool_call>", i):
                return self.end(True)
            if t.startswith("</parameter>", i):
                self.at += 12
                continue
            m = CALL.match(t, i) or FUNCTION.match(t, i)
            if m:
                wrapped = self.wrapped or m[0].startswith("<tool_call>")
                self.end(True)
                self.at, self.wrapped = m.end(), wrapped
                return self.call(m[1])
            self.at += 1

    def end(self, complete):
        if complete:
            self.calls.append([self.name, json.dumps(self.used, ensure_ascii=False, separators=(",", ":"))])

    def after(self):
        """Closers behind a call, and the next call of its wrapper."""
        t = self.text
        while self.at < len(t):
            i = self.skip(self.at)
            for closer in ("</tool_call>", "</function>", "</parameter>"):
                if t.startswith(closer, i):
                    self.at = i + len(closer)
                    self.wrapped &= closer != "</tool_call>"
                    break
            else:
                m = FUNCTION.match(t, i) if self.wrapped else None
                if m:
                    self.at = m.end()
                    self.call(m[1])
                elif i < len(t) and self.wrapped and any(c.startswith(t[i:]) for c in TAGS[:3]):
                    self.at = len(t)
                else:
                    return

    # ---- text

    def is_fenced(self):
        return self.fence or self.fence_mark(self.line, True)

    @staticmethod
    def fence_mark(line, is_open=False):
        m = re.match(r" {0,3}(`{3,}|~{3,})(.*)$", line.rstrip("\n"), re.S)
        return m[1] if m and not (m[1][0] == "`" and "`" in m[2]) else None

    def put(self, c):
        self.parts[self.kind].append(c)
        self.line += c
        if c == "\n":
            line, self.line = self.line[:-1], ""
            if self.fence:
                m = re.fullmatch(r" {0,3}(`{3,}|~{3,})[ \t\r]*", line)
                if m and m[1][0] == self.fence[0] and len(m[1]) >= len(self.fence):
                    self.fence = None
            else:
                self.fence = self.fence_mark(line)

    def reset_line(self):
        self.fence, self.line, self.begins = None, "", True

    def read(self):
        t = self.text
        self.begins = True
        at_start = True
        while self.at < len(t):
            if t.startswith("</think>", self.at):
                self.at += 8
                self.kind = 1
                self.parts[1].append(None)
                self.reset_line()
                at_start = False
                continue
            if at_start and t.startswith("<think>", self.at):
                self.at += 7
                self.reset_line()
                at_start = False
                continue
            m = None
            if not self.is_fenced() and not (self.kind == 0 and self.line.endswith("`")):
                m = CALL.match(t, self.at)
                self.wrapped = bool(m)
                if m and self.kind == 0 and m[1] not in TOOLS:
                    m = None
                elif not m and self.kind == 1 and not self.line:
                    m = BARE.match(t, self.at)
                    m = m if m and m[1] in TOOLS else None
            if m:
                at_start = False
                if self.kind == 0:
                    self.kind = 1
                    self.parts[1].append(None)
                self.at = m.end()
                self.call(m[1])
                self.after()
                self.reset_line()
                continue
            at_start &= t[self.at].isspace()
            self.put(t[self.at])
            self.at += 1
        return {"reasoning": self.joined(0), "content": self.joined(1), "tool_calls": self.calls,
                "finish_reason": "length" if self.cut else "tool_calls" if self.calls else "stop"}

    def joined(self, kind):
        whole, run = "", ""
        for c in self.parts[kind]:
            if c is None:
                whole, run = whole + run.rstrip(), ""
            else:
                run = (run + c) if run else c.lstrip()
        return (whole + run.rstrip()).strip()


PIECES = ["<tool_call>", "</tool_call>", "<function=f>", "<function=g>", "<function=nope>", "<function=", "</function>",
          "<parameter=s>", "<parameter=t>", "<parameter=zz>", "<parameter=", "</parameter>", "</parameter1>", "<think>",
          "</think>", "\n", "\n", "\n", "\n", " ", "x", "word", "```", "`", "~~~", "<", ">", "é", "    ", "</param",
          "<tool_call>\n<function=g>", "<tool_call>\n<function=f>\n", "</function>\n</tool_call>",
          "</parameter>\n</function>\n</tool_call>", "<parameter=s>\nx\n</parameter>\n", "</parameter>\n", "<para",
          "</fun"]


class Rules(unittest.TestCase):
    maxDiff = None

    def test_random_texts(self):
        dice = random.Random(int(os.environ.get("DELTA_SEED", "1")))
        cases, lines = [], []
        tools = [{"type": "function", "function": {"name": n, "parameters": {
            "type": "object", "properties": {p: {"type": "string"} for p in names}}}} for n, names in TOOLS.items()]
        for number in range(ROUNDS):
            text = dice.choice(["", "", "<tool_call>\n<function=f>\n", "<tool_call>\n<function=f>\n<parameter=s>\n"])
            text += "".join(dice.choices(PIECES, k=dice.randint(1, 14)))
            case = {"thinking": dice.random() < 0.4, "finish": dice.choice(["stop", "length"])}
            data = text.encode()
            cuts = sorted(dice.sample(range(len(data) + 1), min(len(data), dice.randint(0, 4))))
            chunks = [base64.b64encode(data[a:b]).decode() for a, b in zip([0, *cuts], [*cuts, len(data)])]
            cases.append((text, case))
            lines.append(json.dumps({"id": number, **case, "tools": tools, "chunks": chunks}))
        done = subprocess.run([DELTACTL, "parse", "--jsonl"], input="\n".join(lines).encode(), capture_output=True,
                              timeout=300, check=True)
        for (text, case), got in zip(cases, map(json.loads, done.stdout.decode().splitlines())):
            want = Reader(text, case["thinking"], case["finish"] == "length").read()
            calls = [[c["name"], c["arguments"]] for c in got["tool_calls"]]
            self.assertEqual({"reasoning": got["reasoning"], "content": got["content"], "tool_calls": calls,
                              "finish_reason": got["finish_reason"]}, want, (text, case))
        self.assertGreater(sum(len(Reader(t, c["thinking"], False).read()["tool_calls"]) > 0 for t, c in cases),
                           ROUNDS // 8)


if __name__ == "__main__":
    unittest.main()
