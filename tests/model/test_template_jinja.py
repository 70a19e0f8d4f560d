"""Random conversations through the demo model's chat_template.jinja and through our C renderer.

Jinja is the oracle: the template is run in the environment that the transformers library makes for
it. The cases are written as a chat_cases.json of their own, and the C test that reads such files
compares. Seed and number of cases: DELTA_SEED, DELTA_CASES.
"""
import json
import os
import random
import subprocess
import sys
import tempfile

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SOURCE = os.environ["DELTA_SOURCE"]
BUILD = os.environ["DELTA_BUILD"]

SPACES = "".join(chr(c) for c in range(0x3001) if chr(c).isspace())
TEXTS = [
    "", " ", "\n", "Hi", "race\n", "  two words ", "line\n\nline", "\t<think>x</think>y", "</think>",
    "<think>\n\na\n\n</think>\n\nb", "a</think>b</think>\n c", "<think>a<think>b</think>c", "\n\n</think>\n d",
    "<tool_response>\nx\n</tool_response>", " <tool_response></tool_response>\n", "<tool_response>x",
    "x</tool_response>", "<|im_end|>", "caf\u00e9 \u4f60\u597d \U0001f600", "\u00a0nbsp\u3000", "\x1cfs\x1f", "\u200bzero\ufeff",
    "\x85", "\u2028x\u2029", "q\"uo'te\\ <b>&amp;", "\u180e", "{\"a\": 1}", "\x7f\x01", "<tool_call>",
]
NUMBERS = [0, -1, 3, 10**30, -0.0, 1.5, 1e16, 1e15, 123456789012345680.0, 1e-5, 0.0001, 1e22, 5e-324,
           1.7976931348623157e308, 0.1, 100.0, 3.14159, float(2**53)]


def text(r):
    if r.random() < 0.15:
        return "".join(r.choice(SPACES + "ab\u200b") for _ in range(r.randrange(8)))
    return r.choice(TEXTS) + (r.choice(TEXTS) if r.random() < 0.3 else "")


def value(r, depth=0):
    kind = r.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [value(r, depth + 1) for _ in range(r.randrange(4))]
    if kind == 7:
        return {text(r) + str(i): value(r, depth + 1) for i in range(r.randrange(4))}
    return [text(r), r.choice(NUMBERS), r.choice(NUMBERS), None, True, False][kind]


def part(r):
    return r.choice([
        lambda: {"type": "text", "text": text(r)}, lambda: {"type": "text", "text": text(r)}, lambda: {"text": text(r)},
        lambda: {"type": "image"}, lambda: {"type": "image_url", "image_url": {"url": "x"}},
        lambda: {"image": "x"}, lambda: {"type": "video", "video": "y"}, lambda: {"video": None, "text": "z"},
    ])()


def content(r, media=True):
    k = r.random()
    if k < 0.6:
        return text(r)
    if k < 0.65:
        return None
    parts = [part(r) for _ in range(r.randrange(5))]
    return parts if media else [p for p in parts if "text" in p and "video" not in p]


def call(r):
    fn = {"name": r.choice(["f", "get_time", "a.b-c", "\u00e9"])}
    if r.random() < 0.9:
        fn["arguments"] = {f"k{i}" + r.choice(["", " x", "\u00e9"]): value(r) for i in range(r.randrange(4))}
    return fn if r.random() < 0.2 else {"id": "1", "type": "function", "function": fn}


def message(r, first):
    role = r.choices(["user", "assistant", "tool", "system"], [4, 4, 4, 4 if first else 0.1])[0]
    m = {"role": role, "content": content(r, role != "system" or r.random() < 0.1)}
    if r.random() < 0.05:
        del m["content"]
    if role == "assistant":
        if r.random() < 0.4:
            m["reasoning_content"] = r.choice([text(r), text(r), None])
        if r.random() < 0.5:
            m["tool_calls"] = r.choice([None, [call(r) for _ in range(r.randrange(4))]])
    return m


def broken(r, messages):
    m = r.choice(messages)
    k = r.randrange(3)
    if k == 0:
        m["content"] = r.choice([17, True, {"type": "text"}, 1.5])
    elif k == 1:
        m["content"] = [{"foo": 1}]
    else:
        m["role"] = r.choice(["developer", "function", ""])


def case(r, i):
    messages = [message(r, k == 0) for k in range(r.randrange(1, 8))]
    if r.random() < 0.8 and not any(m["role"] == "user" for m in messages):
        messages.insert(1, {"role": "user", "content": "Hi"})
    if r.random() < 0.05:
        # One fault only: of several we name the first message's, the template the one it meets first.
        messages = [m for k, m in enumerate(messages) if k == 0 or m["role"] != "system"]
        messages[0]["content"] = text(r)
        broken(r, messages)
        messages.append({"role": "user", "content": "Hi"})
    options = {}
    for name in ("add_generation_prompt", "enable_thinking", "preserve_thinking", "add_vision_id"):
        if r.random() < 0.5:
            options[name] = r.random() < 0.5
    if r.random() < 0.3:
        options["tools"] = r.choice([None, [], [
            {"type": "function", "function": {"name": "f", "description": text(r), "parameters": value(r)}}
            for _ in range(r.randrange(1, 4))]])
    return {"name": f"random-{i}", "messages": messages, "options": options}


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = lambda v, indent=None: json.dumps(v, ensure_ascii=False, indent=indent)

    def raise_exception(why):
        raise TemplateError(why)

    env.globals["raise_exception"] = raise_exception
    return env


def main():
    seed = int(os.environ.get("DELTA_SEED", "1"))
    n = int(os.environ.get("DELTA_CASES", "3000"))
    r = random.Random(seed)
    with open(os.path.join(SOURCE, "engine/demo-model/w8a16/chat_template.jinja"), encoding="utf-8") as f:
        template = environment().from_string(f.read())
    cases = []
    for i in range(n):
        c = case(r, i)
        # What is rendered is what comes back from JSON, as a server gets it.
        c = json.loads(json.dumps(c))
        try:
            c["rendered"] = template.render(messages=c["messages"], **c["options"])
        except TemplateError as e:
            c["error"] = str(e)
        cases.append(c)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "chat_cases.json"), "w", encoding="utf-8") as f:
            json.dump(cases, f, ensure_ascii=False)
        done = subprocess.run(
            [os.path.join(BUILD, "tests/test_golden_chat"),
             "golden_chat_cases_render_byte_equal_or_fail_for_the_same_reason"],
            env={**os.environ, "DELTA_GOLDEN": folder}, stdout=subprocess.PIPE, check=False)
    out = done.stdout.decode("utf-8", "replace")
    errors = sum("error" in c for c in cases)
    print(out + f"{n} conversations, {errors} of them refused, seed {seed}")
    skipped = "SKIP" in out
    return 1 if done.returncode or skipped or errors == n else 0


if __name__ == "__main__":
    sys.exit(main())
