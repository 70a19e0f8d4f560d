"""What the answer is held to: random tool sets and schemas at a temperature at which the model writes anything.

Every answer that ended by itself must be valid, judged by python3-jsonschema, and the parser must have had nothing to
mend. DELTA_RANDOM=N runs N of each kind (default 12)."""
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import daemon  # noqa: E402
import grpc  # noqa: E402
import ttrpc  # noqa: E402

try:
    import jsonschema
except ImportError:
    jsonschema = None

N = int(os.environ.get("DELTA_RANDOM", "12"))
INFERENCE, MODEL = (f"deltad/v1/{n}.proto" for n in ("inference", "model"))
CHAT = "/deltad.v1.InferenceService/Chat"
STOP, TOOL_CALLS, LENGTH = 1, 2, 3


def setUpModule():
    global d, m, t, inference, model
    d = daemon.Daemon()
    m, t = daemon.module(INFERENCE), daemon.module("deltad/v1/types.proto")
    inference, model = d.stub(INFERENCE, "InferenceService"), d.stub(MODEL, "ModelService")


def tearDownModule():
    d.stop()


# ---- random schemas

WORDS = ["city", "name", "count", "path", "unit", "when", "tags", "items", "mode", "on", "x-y", "ünit", "a", "id", "note"]


class Dice(random.Random):
    def scalar(self):
        kind = self.choice(["string", "enum", "pattern", "length", "format", "integer", "range", "number", "boolean", "null", "const"])
        if kind == "string":
            return {"type": "string", "maxLength": 30}
        if kind == "enum":
            return {"enum": self.sample(["red", "dark blue", "C", ">=", 3, True, None, 1.5, "é"], self.randint(1, 4))}
        if kind == "pattern":
            return {"type": "string", "pattern": self.choice(["^[a-z]{2,5}$", "^(ab|cd){1,4}x?$", r"^\d{4}-\d{2}$", "^[A-Z][a-z]{0,9}( [A-Z][a-z]{0,9})?$"])}
        if kind == "length":
            return {"type": "string", "minLength": self.randint(0, 3), "maxLength": self.randint(3, 12)}
        if kind == "format":
            return {"type": "string", "format": self.choice(["date", "uuid", "ipv4", "time"])}
        if kind == "integer":
            return {"type": "integer", "minimum": -99, "maximum": 99}
        if kind == "range":
            low = self.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + self.randint(0, 200)}
        if kind == "const":
            return {"const": self.choice(["fixed", 7, False, None])}
        return {"type": kind}

    def schema(self, depth=2):
        kind = self.choice(["scalar", "scalar", "scalar", "object", "array", "anyOf", "nullable"]) if depth else "scalar"
        if kind == "object":
            return self.object(depth - 1)
        if kind == "array":
            low = self.randint(0, 2)
            return {"type": "array", "items": self.schema(depth - 1), "minItems": low, "maxItems": low + self.randint(0, 2)}
        if kind == "anyOf":
            return {"anyOf": [self.schema(depth - 1), self.scalar()]}
        if kind == "nullable":
            return {"type": ["string", "null"], "maxLength": 10}
        return self.scalar()

    def object(self, depth=2, n=None):
        names = self.sample(WORDS, n if n is not None else self.randint(0, 4))
        return {"type": "object", "properties": {k: self.schema(depth) for k in names},
                "required": [k for k in names if self.random() < 0.6], "additionalProperties": False}

    def answer_schema(self):
        s = self.object(2) if self.random() < 0.8 else self.schema(2)
        if self.random() < 0.2:
            s = {"type": "object", "$defs": {"node": s}, "properties": {"it": {"$ref": "#/$defs/node"}}, "required": ["it"],
                 "additionalProperties": False}
        return s

    def tools(self):
        names = self.sample(["get_weather", "read.file", "run-it", "f", "search_the_web", "Write"], self.randint(1, 4))
        return [{"type": "function", "function": {"name": n, "description": "Does it.", "parameters": self.parameters()}} for n in names]

    def parameters(self):
        """An object as the arguments of a call. A parameter that may be a text or something else is refused unless the
        text is free and every value of the other types is allowed: the text says nothing of its type."""
        s = self.object(1)
        for name, p in s["properties"].items():
            if isinstance(p.get("type"), list):
                del p["maxLength"]
            elif "anyOf" in p:
                s["properties"][name] = self.choice([
                    {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 20}, {"type": "array", "items": self.scalar(), "maxItems": 2}]},
                    {"type": ["integer", "string"]}, {"anyOf": [{"type": "null"}, {"type": "number"}, {"type": "boolean"}]}])
        return s


# ---- asking

def request(dice, tools=(), **more):
    think = dice.random() < 0.3
    return m.ChatRequest(messages=[t.Message(role=2, parts=[t.Part(text=dice.choice(["What is the weather in Paris?", "hello", "Do it now.",
                                                                                   "Write a file and tell me."]))])],
                         tools=[t.Tool(openai_json=json.dumps(x)) for x in tools],
                         reasoning=t.Reasoning(mode=1 if think else 2, **({"budget_tokens": 40} if think else {})),
                         sampling=t.Sampling(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=dice.randrange(1 << 30)),
                         stopping=t.Stopping(max_tokens=700), **more)


def gather(events):
    out = {"text": "", "reasoning": "", "calls": [], "deltas": {}}
    for e in events:
        kind = e.WhichOneof("event")
        if kind == "text":
            out["text"] += e.text.text
        elif kind == "reasoning":
            out["reasoning"] += e.reasoning.text
        elif kind == "call_args":
            out["deltas"][e.call_args.index] = out["deltas"].get(e.call_args.index, "") + e.call_args.json
        elif kind == "call_end":
            assert e.call_end.arguments_json == out["deltas"].get(e.call_end.index, "")
            out["calls"].append(e.call_end)
        elif kind == "finished":
            out["reason"] = e.finished.reason
            out["seed"] = e.finished.seed
    return out


def repairs():
    return {c.name: c.value for c in model.GetStats(daemon.module(MODEL).GetStatsRequest()).repairs if c.value}


def together(work, n):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, range(n)))


@unittest.skipIf(jsonschema is None, "python3-jsonschema is not installed")
class Random(unittest.TestCase):
    def check_valid(self, schema, value, told):
        try:
            jsonschema.Draft202012Validator(schema, format_checker=jsonschema.draft202012_format_checker).validate(value)
        except jsonschema.ValidationError as e:
            self.fail(f"{e.message} at {list(e.absolute_path)}: {told}")

    def check_calls(self, tools, out, told):
        schemas = {x["function"]["name"]: x["function"]["parameters"] for x in tools}
        for c in out["calls"]:
            if c.state == 1:
                self.check_valid(schemas[c.name], json.loads(c.arguments_json), told)

    def run_calls(self, choose, check):
        before = repairs()

        def one(i):
            dice = Dice(f"{self.id()} {i}")
            tools = dice.tools()
            q = request(dice, tools, tool_choice=choose(dice, tools))
            return q, tools, gather(inference.Chat(q, timeout=300))

        cut = 0
        for q, tools, out in together(one, N):
            told = f"{out}\n{json.dumps(tools)}"
            self.check_calls(tools, out, told)
            if out["reason"] == LENGTH:
                cut += 1
            else:
                self.assertEqual(out["reason"], TOOL_CALLS, told)
                self.assertEqual(out["text"], "", told)
                self.assertTrue(all(c.state == 1 for c in out["calls"]), told)
                check(q, out, told)
        after = repairs()
        mended = {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}
        for name in ("call_cut", "tag_in_value"):  # the token limit; a </parameter> that the model wrote as text
            mended.pop(name, None)
        print(f"# {N} answers, {cut} cut by the token limit, repairs {mended}")
        self.assertFalse(mended)
        self.assertLess(cut, N / 2 + 1)

    def test_required(self):
        self.run_calls(lambda dice, tools: t.ToolChoice(mode=3), lambda q, out, told: self.assertTrue(out["calls"], told))

    def test_named(self):
        def check(q, out, told):
            self.assertEqual([c.name for c in out["calls"]], [q.tool_choice.name], told)
        self.run_calls(lambda dice, tools: t.ToolChoice(name=dice.choice(tools)["function"]["name"]), check)

    def test_allowed(self):
        def check(q, out, told):
            self.assertLessEqual({c.name for c in out["calls"]}, set(q.tool_choice.allowed.names), told)
        self.run_calls(lambda dice, tools: t.ToolChoice(allowed=t.ToolChoice.AllowedTools(
            mode=3, names=[x["function"]["name"] for x in tools[:2]])), check)

    def test_json_schema(self):
        def one(i):
            dice = Dice(f"{self.id()} {i}")
            schema = dice.answer_schema()
            q = request(dice, format=t.OutputFormat(json_schema=json.dumps(schema, ensure_ascii=dice.random() < 0.5)))
            return schema, gather(inference.Chat(q, timeout=300))

        cut = 0
        for schema, out in together(one, N):
            told = f"{out}\n{json.dumps(schema)}"
            if out["reason"] == LENGTH:
                cut += 1
                continue
            self.assertEqual(out["reason"], STOP, told)
            self.check_valid(schema, json.loads(out["text"]), told)
        print(f"# {N} answers, {cut} cut by the token limit")
        self.assertLess(cut, N / 2 + 1)

    def test_strict_calls_when_the_model_chooses(self):
        def one(i):
            dice = Dice(f"{self.id()} {i}")
            tools = dice.tools()
            for x in tools:
                x["function"]["strict"] = True
            q = request(dice, tools)
            q.sampling.temperature = 1.0
            return tools, gather(inference.Chat(q, timeout=300))

        for tools, out in together(one, N):
            self.check_calls(tools, out, f"{out}\n{json.dumps(tools)}")


class Forms(unittest.TestCase):
    def ask(self, fmt, think=False, **more):
        q = request(random.Random(5), format=fmt, **more)
        q.reasoning.CopyFrom(t.Reasoning(mode=1 if think else 2))
        return gather(inference.Chat(q, timeout=120))

    def test_regex_choice_object_grammar(self):
        for think in (False, True):
            out = self.ask(t.OutputFormat(regex=r"(yes|no), \d{2,4}"), think)
            self.assertRegex(out["text"], r"\A(yes|no), \d{2,4}\Z")
            self.assertEqual(bool(out["reasoning"]), think)
            out = self.ask(t.OutputFormat(choice=t.OutputFormat.Choices(choices=["red", "green tea", "é"])), think)
            self.assertIn(out["text"], ["red", "green tea", "é"])
        out = self.ask(t.OutputFormat(json_object=True))
        if out["reason"] == STOP:
            self.assertIsInstance(json.loads(out["text"]), dict)

    def test_what_cannot_be_held_is_refused_with_its_path(self):
        bad = [(t.OutputFormat(json_schema='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
               (t.OutputFormat(json_schema='{"type": "object", "properties": {"a": {"not": {}}}}'), "properties.a"),
               (t.OutputFormat(json_schema="{"), "JSON"), (t.OutputFormat(regex="(a"), ""), (t.OutputFormat(regex="(?=a)"), ""),
               (t.OutputFormat(grammar="root ::= nothing"), "line 1")]
        for fmt, part in bad:
            with self.assertRaises(grpc.RpcError) as e:
                self.ask(fmt)
            self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT, e.exception.details())
            self.assertIn(part, e.exception.details())
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}}
        with self.assertRaises(grpc.RpcError) as e:
            list(inference.Chat(request(random.Random(1), [tool], tool_choice=t.ToolChoice(mode=3))))
        self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("tools[0]", e.exception.details())
        for choice in (t.ToolChoice(name="nobody"), t.ToolChoice(allowed=t.ToolChoice.AllowedTools(names=["f", "g"]))):
            with self.assertRaises(grpc.RpcError) as e:
                list(inference.Chat(request(random.Random(1), [tool], tool_choice=choice)))
            self.assertIn("there is no tool", e.exception.details())

    def test_the_token_limit_ends_it_as_length(self):
        q = request(random.Random(1), format=t.OutputFormat(json_schema='{"type": "string", "minLength": 200}'))
        q.stopping.max_tokens = 12
        q.reasoning.mode = 2
        self.assertEqual(gather(inference.Chat(q))["reason"], LENGTH)

    def test_generate_too(self):
        q = m.GenerateRequest(text="The answer is", format=t.OutputFormat(regex="[0-9]{3}"), sampling=t.Sampling(temperature=1.5))
        text = "".join(e.text.text for e in inference.Generate(q, timeout=60))
        self.assertRegex(text, r"\A[0-9]{3}\Z")

    def test_a_grammar_is_compiled_once(self):
        read = lambda: model.GetStats(daemon.module(MODEL).GetStatsRequest()).grammars  # noqa: E731
        tools, before = Dice("once").tools(), read()
        for seed in range(4):
            q = request(random.Random(seed), tools, tool_choice=t.ToolChoice(mode=3))
            q.reasoning.CopyFrom(t.Reasoning(mode=2))
            gather(inference.Chat(q, timeout=120))
        after = read()
        self.assertEqual((after.compiled - before.compiled, after.found - before.found), (1, 3))
        self.assertGreater(after.masks, before.masks)

    def test_a_tool_that_is_not_strict_keeps_its_arguments(self):
        weather = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather for a city.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "description": "City name"}, "days": {"type": "integer"}},
            "required": ["city"], "not": {}}}}  # a schema that could not be held
        other = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}}}
        for more in ({}, {"parallel_tool_calls": False},
                     {"tool_choice": t.ToolChoice(allowed=t.ToolChoice.AllowedTools(mode=1, names=["get_weather"]))}):
            q = request(random.Random(2), [weather, other], **more)
            q.messages[0].parts[0].text = "What is the weather in Paris?"
            q.reasoning.CopyFrom(t.Reasoning(mode=2))
            q.sampling.CopyFrom(t.Sampling(temperature=0))
            out = gather(inference.Chat(q, timeout=60))
            self.assertEqual([(c.name, json.loads(c.arguments_json)) for c in out["calls"]], [("get_weather", {"city": "Paris"})], more)

    def test_a_call_is_not_ended_before_its_required_parameters_are_there(self):
        """The model would say the city alone and end: it is led to the unit, and the city stays what it was."""
        tool = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather for a city.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "description": "City name"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"]}}}
        q = request(random.Random(2), [tool], tool_choice=t.ToolChoice(mode=3))
        q.messages[0].parts[0].text = "What is the weather in Paris?"
        q.reasoning.CopyFrom(t.Reasoning(mode=2))
        q.sampling.CopyFrom(t.Sampling(temperature=0))
        (call,) = gather(inference.Chat(q, timeout=60))["calls"]
        self.assertEqual(json.loads(call.arguments_json)["city"], "Paris")
        self.assertIn(json.loads(call.arguments_json)["unit"], ("C", "F"))

    def test_one_call_only(self):
        tools = Dice(3).tools()
        for seed in range(10):
            q = request(random.Random(seed), tools, tool_choice=t.ToolChoice(mode=3), parallel_tool_calls=False)
            self.assertLessEqual(len(gather(inference.Chat(q, timeout=120))["calls"]), 1)

    def test_the_same_over_every_door(self):
        dice = Dice(11)
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["n", "s"], "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 12}}, "additionalProperties": False}}}]
        q = request(dice, tools, tool_choice=t.ToolChoice(name="f"))
        q.reasoning.CopyFrom(t.Reasoning(mode=2))
        q.sampling.CopyFrom(t.Sampling(temperature=1.0, seed=7, top_p=1, top_k=0))
        a = gather(inference.Chat(q, timeout=60))
        with ttrpc.Client(str(d.ttrpc), timeout=60) as c:
            b = gather(m.ChatEvent.FromString(x) for x in c.messages(c.start(CHAT, q.SerializeToString())))
        folder = pathlib.Path(d.folder)
        (folder / "tools.json").write_text(json.dumps(tools))
        (folder / "messages.json").write_text(json.dumps([{"role": "user", "content": q.messages[0].parts[0].text}]))
        r = subprocess.run([daemon.BUILD / "clients/deltactl", "--socket", d.socket, "chat", "--json", "--no-think", "--temperature", "1",
                            "--seed", "7", "--top-p", "1", "--top-k", "0", "--max-tokens", "700", "--tools", folder / "tools.json",
                            "--messages", folder / "messages.json", "--tool-choice", "f"], capture_output=True, text=True, timeout=60)
        self.assertEqual(r.returncode, 0, r.stderr)
        end = next(e["call_end"] for e in map(json.loads, r.stdout.splitlines()) if "call_end" in e)
        self.assertEqual([(c.name, c.arguments_json) for c in a["calls"]], [(c.name, c.arguments_json) for c in b["calls"]])
        self.assertEqual((a["calls"][0].name, a["calls"][0].arguments_json), (end["name"], end["arguments_json"]))

    def test_in_a_session(self):
        s = daemon.module("deltad/v1/session.proto")
        sessions = d.stub("deltad/v1/session.proto", "SessionService")
        x = sessions.CreateSession(s.CreateSessionRequest()).session
        for i in range(3):
            q = request(random.Random(i), session_id=x.id, format=t.OutputFormat(choice=t.OutputFormat.Choices(choices=["a b", "c"])))
            self.assertIn(gather(inference.Chat(q, timeout=60))["text"], ("a b", "c"))
        sessions.CloseSession(s.CloseSessionRequest(session_id=x.id))


if __name__ == "__main__":
    unittest.main()
