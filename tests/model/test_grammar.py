"""Constrained output against other judges: Python's re, python3-jsonschema, and the output parser.

delta-grammar compiles random regular expressions, schemas and tool sets, checks texts and samples turns from the
masks of the demo vocabulary. Every text must be accepted if and only if re says so; every instance that the schema's
rule accepts must be valid; every sampled turn must be valid, and read by the parser as the grammar meant it. For some,
each mask is compared bit by bit with what the matcher takes.
An argument sets how many cases there are of each sort (default 60).
"""
import base64
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import unicodedata

BUILD = pathlib.Path(os.environ.get("DELTA_BUILD", "build"))
SOURCE = pathlib.Path(os.environ.get("DELTA_SOURCE", "."))
MODEL = SOURCE / "engine/demo-model/w8a16"
CASES = int(sys.argv[1]) if len(sys.argv) > 1 else 60
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 1
failures = []


def run(specs):
    lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in specs)
    p = subprocess.run([BUILD / "engine/delta-grammar", "--model", MODEL], input=lines.encode(), stdout=subprocess.PIPE, timeout=1500)
    if p.returncode:
        raise SystemExit(f"delta-grammar ended with {p.returncode}")
    answers = [json.loads(x) for x in p.stdout.decode().split("\n")[:-1]]
    assert len(answers) == len(specs)
    return answers


def fail(what, spec, detail):
    failures.append(what)
    if os.environ.get("GRAMMAR_FAILURES"):
        with open(os.environ["GRAMMAR_FAILURES"], "a") as f:
            f.write(json.dumps(spec, ensure_ascii=False) + "\n")
    if len(failures) <= 10:
        print(f"not ok: {what}\n  spec {json.dumps(spec, ensure_ascii=False)[:1500]}\n  {detail}"[:4000])


# ---- regular expressions

def regex(r, depth=0):
    k = r.randrange(9 if depth < 3 else 5)
    if k < 2:
        return r.choice(["a", "b", "0", "-", "é", "€", "\\.", "x", "\\n", "\\u0041", "\\x62"])
    if k == 2:
        return r.choice(["[ab]", "[^a]", "[a-c0-2]", "\\d", "\\w", "\\s", ".", "[^\\d]", "[é-ü]", "[\\w-]", "\\S", "[^\\s\"]"])
    if k < 5:
        return regex(r, depth + 1) + r.choice(["", "", "?", "*", "+", "{2}", "{1,3}", "{0,2}", "*?"]) if depth < 3 else "a"
    if k < 7:
        return regex(r, depth + 1) + regex(r, depth + 1)
    return r.choice(["(", "(?:"]) + regex(r, depth + 1) + "|" + regex(r, depth + 1) + ")"


def text_like(r):
    return "".join(r.choice("ab0-éx€A. \n\"bb00c2ü_Z٣") for _ in range(r.randrange(7)))


def regexes():
    r = random.Random(SEED)
    specs = []
    while len(specs) < CASES:
        e = regex(r)
        try:
            re.compile(e)
        except re.error:
            continue
        specs.append({"regex": e, "texts": [text_like(r) for _ in range(40)], "samples": 5, "seed": r.randrange(1 << 30), "check": len(specs) % 4 == 0})
    wide = re.compile("\\\\[wdsS]|\\.|\\[\\^")
    n = 0
    for spec, a in zip(specs, run(specs)):
        if "error" in a:
            if a["code"] not in ("EUNSUPPORTED",) and "two repetitions" not in a["error"]:
                fail("a regular expression is refused", spec, a["error"])
            continue
        n += 1
        if "fault" in a:
            fail("masks of a regular expression", spec, a)
        for t, accepted in zip(spec["texts"], a["accepted"]):
            matches = re.fullmatch(spec["regex"], t) is not None
            # classes hold only what all languages agree on: beyond ASCII they may be narrower
            if matches != accepted and not (matches and wide.search(spec["regex"])):
                fail("a text against re", spec, (t, matches, accepted))
        for t in a["samples"]:
            if not re.fullmatch(spec["regex"], t):
                fail("a sample against re", spec, repr(t))
    print(f"# {n} regular expressions")
    if n < len(specs) * 0.8:
        fail("too many are refused", {}, n)


# ---- schemas

WORDS = ["name", "city", "unit", "x", "list_of", "größe", "a b", "is-ok", "count", "id"]


def string_schema(r, plain=False):
    k = r.randrange(9)
    s = {"type": "string"}
    if k == 0 and not plain:
        s["enum"] = r.sample(["red", "green", "blue", "dark \"blue\"", "a\\b", "", "tab\t", "ß", "null", "true", "12"], r.randrange(1, 5))
    elif k == 1:
        s["minLength"] = r.randrange(3)
        s["maxLength"] = r.randrange(3, 12)
    elif k == 2:
        s["pattern"] = r.choice(["^[a-z]+$", "^\\d{3}-\\d{4}$", "ab", "^(yes|no)$", "^[^\"\\\\]{2,5}$", "x$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$"])
    elif k == 3:
        s["format"] = r.choice(["date", "time", "date-time", "uuid", "email", "ipv4", "ipv6", "uri", "hostname"])
    elif k == 4:
        s["maxLength"] = r.choice([0, 1, 40, 300])
    elif k == 5:
        s |= {"pattern": "^[a-z0-9_]+$", "minLength": 2, "maxLength": 6}
    return s


def number_schema(r):
    s = {"type": r.choice(["integer", "number"])}
    k = r.randrange(7)
    lo = r.choice([-100, -3, 0, 1, 5, 99, -0.5, 0.25, 12.75])
    hi = lo + r.choice([0, 1, 7, 0.5, 1000, 123456])
    if k == 1:
        s["minimum"] = lo
    elif k == 2:
        s["maximum"] = hi
    elif k == 3:
        s |= {"minimum": lo, "maximum": hi}
    elif k == 4:
        s |= {"exclusiveMinimum": lo, "maximum": hi + 1}
    elif k == 5:
        s |= {"minimum": lo, "exclusiveMaximum": hi + 2}
    elif k == 6:
        s = {"type": "integer", "multipleOf": r.choice([1, 3, 5, 10, 64])}
        if r.random() < .5:
            s |= {"minimum": -20, "maximum": 300}
    return s


def schema(r, depth=0):
    k = r.randrange(12 if depth < 3 else 5)
    if k < 2:
        return string_schema(r)
    if k == 2:
        return number_schema(r)
    if k == 3:
        return r.choice([{"type": "boolean"}, {"type": "null"}, {"const": r.choice([1, "a", None, [1, 2], {"k": "v"}, "<b>"])},
                         {"enum": [1, "two", None, 3.5, True]}, {"type": ["string", "null"]}, {"type": ["integer", "boolean"]}])
    if k == 4:
        return {"$ref": "#/$defs/" + r.choice(["node", "leaf", "tree"])}
    if k < 7:
        s = {"type": "array", "items": schema(r, depth + 1)}
        if r.random() < .4:
            s["minItems"] = r.randrange(3)
        if r.random() < .4:
            s["maxItems"] = r.randrange(2, 5)
        if r.random() < .2:
            s |= {"prefixItems": [schema(r, depth + 1), schema(r, depth + 1)]}
        return s
    if k == 7:
        return {r.choice(["anyOf", "oneOf"]): [schema(r, depth + 1) for _ in range(r.randrange(1, 4))]}
    if k == 8:
        return {"type": "object", "additionalProperties": schema(r, depth + 1)}
    if k == 9:
        return r.choice([{}, True, {"type": "object"}, {"type": "array"}, {"type": "object", "patternProperties": {"^[a-z]{1,3}$": schema(r, depth + 1)}}])
    names = r.sample(WORDS, r.randrange(1, 5))
    s = {"type": "object", "properties": {n: schema(r, depth + 1) for n in names}}
    s["required"] = [n for n in names if r.random() < .5]
    if r.random() < .3:
        s["additionalProperties"] = r.choice([True, False, {"type": "integer"}])
    if r.random() < .15:
        s = {"allOf": [s, {"properties": {names[0]: {}}, "description": "x"}]}
    return s


DEFS = {"leaf": {"type": "string", "maxLength": 8},
        "node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                 "required": ["v"], "additionalProperties": False},
        "tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}


def root_schema(r):
    s = schema(r)
    return {"$defs": DEFS, **s} if isinstance(s, dict) else s


def validator(jsonschema, s):
    """oneOf is anyOf here."""
    def loosen(v):
        if isinstance(v, dict):
            return {("anyOf" if k == "oneOf" else k): loosen(x) for k, x in v.items()}
        return [loosen(x) for x in v] if isinstance(v, list) else v
    return jsonschema.Draft202012Validator(loosen(s), format_checker=jsonschema.draft202012_format_checker)


def schemas(jsonschema):
    r = random.Random(SEED + 1)
    specs = [{"schema": root_schema(r), "samples": 6, "seed": r.randrange(1 << 30), "check": i % 6 == 0} for i in range(CASES)]
    answers = run(specs)
    n = texts = 0
    again = []
    for spec, a in zip(specs, answers):
        if "error" in a:
            if a["code"] == "EUNSUPPORTED" or "nothing matches" in a["error"] or "240" in a["error"]:
                continue
            fail("a schema is refused", spec, a["error"])
            continue
        n += 1
        if "fault" in a:
            fail("masks of a schema", spec, a)
        v = validator(jsonschema, spec["schema"])
        good = []
        for t in a["samples"]:
            texts += 1
            try:
                value = json.loads(t)
            except ValueError as e:
                fail("a sample is no JSON", spec, (t, str(e)))
                continue
            errors = list(v.iter_errors(value))
            if errors:
                fail("a sample is not valid", spec, (t, errors[0].message))
            good.append(value)
        # what was sampled, bent a little: accepted only if valid; as it is, in another spelling: accepted
        bent = [json.dumps(bend(r, value), ensure_ascii=False) for value in good for _ in range(4)]
        again.append({"schema": spec["schema"], "texts": bent + [json.dumps(x, ensure_ascii=False, indent=2) for x in good],
                      "n_bent": len(bent), "good": good})
    for spec, a in zip(again, run([{k: s[k] for k in ("schema", "texts")} for s in again])):
        v = validator(jsonschema, spec["schema"])
        for i, (t, accepted) in enumerate(zip(spec["texts"], a["accepted"])):
            valid = v.is_valid(json.loads(t))
            if accepted and not valid:
                fail("an instance that is not valid is accepted", spec, t)
            # numbers, escapes and keys that Python spells otherwise may be refused for their spelling
            if not accepted and i >= spec["n_bent"] and unicodedata.is_normalized("NFC", t) and not re.search("\\\\|[0-9]e|E|[0-9]{15}|</|\\.0", t):
                fail("what was sampled is refused", spec, t)
    print(f"# {n} schemas of {len(specs)}, {texts} samples")
    if n < len(specs) * 0.6:
        fail("too many are refused", {}, n)


def bend(r, v):
    if isinstance(v, dict) and v:
        k = r.choice(list(v))
        w = dict(v)
        if r.random() < .3:
            del w[k]
        elif r.random() < .2:
            w["zzz"] = 1
        else:
            w[k] = bend(r, v[k])
        return w
    if isinstance(v, list) and v and r.random() < .6:
        w = list(v)
        i = r.randrange(len(w))
        if r.random() < .3:
            w.append(w[i])
        elif r.random() < .3:
            del w[i]
        else:
            w[i] = bend(r, w[i])
        return w
    return r.choice([v, None, 1, -1, 0.5, "", "abc", "x" * 13, True, [], {}, 10**6, {"v": 1}])


# ---- calls

def param_schema(r):
    k = r.randrange(10)
    if k < 3:
        return {"type": "string"}
    if k == 3:
        return string_schema(r)
    if k == 4:
        return r.choice([{"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, {},
                         {"anyOf": [{"type": "string"}, {"type": "integer"}]}, {"type": "string", "enum": ["a", "b b", "c"]},
                         {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]}])
    if k == 5:
        return {"type": "object", "additionalProperties": {"type": "string"}}
    return schema(r, 1)


def tool(r, i):
    names = r.sample(WORDS + ["path", "content", "old_string"], r.randrange(0, 5))
    return {"type": "function", "function": {"name": f"{r.choice(['get', 'read_file', 'run'])}_{i}", "parameters": {
        "type": "object", "properties": {n: param_schema(r) for n in names}, "required": [n for n in names if r.random() < .5], "$defs": DEFS}}}


def calls(jsonschema):
    r = random.Random(SEED + 2)
    specs = []
    for i in range(CASES):
        tools = [tool(r, k) for k in range(r.randrange(1, 5))]
        spec = {"calls": r.choice(["auto", "required", "required"]), "tools": tools, "thinking": r.random() < .4,
                "calls_in_reasoning": r.random() < .7, "calls_in_fences": r.random() < .3, "parallel": r.random() < .6, "samples": 6, "seed": r.randrange(1 << 30), "check": i % 6 == 0}
        if r.random() < .3:
            spec["allowed"] = [r.choice(tools)["function"]["name"]]
        specs.append(spec)
    cases, n = [], 0
    for spec, a in zip(specs, run(specs)):
        if "error" in a:
            if a["code"] != "EUNSUPPORTED" and "no value is possible" not in a["error"]:
                fail("a tool set is refused", spec, a["error"])
            continue
        n += 1
        if "fault" in a:
            fail("masks of a tool set", spec, a)
        for t in a["samples"]:
            data = t.encode()
            cut = r.randrange(len(data) + 1)
            cases.append((spec, t, {"id": len(cases), "thinking": spec["thinking"], "tool_choice": spec["calls"], "finish": "stop", "tools": spec["tools"],
                                    "calls_in_reasoning": spec["calls_in_reasoning"], "calls_in_fences": spec["calls_in_fences"],
                                    "chunks": [base64.b64encode(x).decode() for x in (data[:cut], data[cut:])]}))
    p = subprocess.run([BUILD / "clients/deltactl", "parse", "--jsonl"], stdout=subprocess.PIPE, timeout=600,
                       input="".join(json.dumps(c) + "\n" for _, _, c in cases).encode())
    answers = [json.loads(x) for x in p.stdout.decode().split("\n")[:-1]]
    if len(answers) != len(cases):
        return fail("deltactl parse", {}, p.stdout[-500:])
    n_calls = 0
    for (spec, text, _), a in zip(cases, answers):
        got = a["tool_calls"]
        n_calls += len(got)
        if spec["calls"] == "required" and not got:
            fail("a required call is missing", spec, (text, a))
        if spec["calls"] == "required" and a["content"].strip():
            fail("content besides a required call", spec, (text, a))
        if not spec["parallel"] and len(got) > 1:
            fail("more than one call", spec, (text, a))
        if got and a["finish_reason"] != "tool_calls":
            fail("a call is not complete", spec, (text, a))
        for c in got:
            declared = {t["function"]["name"]: t["function"]["parameters"] for t in spec["tools"]}
            if c["name"] not in spec.get("allowed", declared):
                fail("a tool that is not allowed", spec, (text, a))
                continue
            parameters = declared[c["name"]] | {"additionalProperties": False}
            errors = list(validator(jsonschema, parameters).iter_errors(json.loads(c["arguments"])))
            if errors:
                fail("arguments are not valid", spec, (text, a, errors[0].message))
    print(f"# {n} tool sets of {len(specs)}, {len(cases)} turns, {n_calls} calls")
    if n < len(specs) * 0.5 or n_calls < n:
        fail("too few calls", {}, (n, n_calls))


def fences():
    """A call that the parser takes is held to its schema, one that it takes for text is not."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}
    texts = [f"{fence}\n<tool_call>\n<function=f>\n<parameter=n>\n{n}\n</parameter>\n</function>\n</tool_call>"
             for fence in ("a", "```", "~~~~ xml") for n in ("5", "five")]
    for takes, want in (False, [True, False, True, True, True, True]), (True, [True, False] * 3):
        spec = {"calls": "auto", "tools": [tool], "calls_in_fences": takes, "texts": texts}
        (a,) = run([spec])
        if a.get("accepted") != want:
            fail("calls in fences", spec, a)


def main():
    try:
        import jsonschema
    except ImportError:
        jsonschema = None
    regexes()
    fences()
    if jsonschema:
        schemas(jsonschema)
        calls(jsonschema)
    else:
        print("# SKIP schemas and calls: python3-jsonschema is not installed")
    print(f"{'not ok' if failures else 'ok'}: {len(failures)} failures")
    return bool(failures)


sys.exit(main())
