"""Masks for the schemas of an agent: compile time, mask times, cache hits, as a table.

    tests/model/test_tokenizer_qwen.py FOLDER     writes FOLDER/qwen, the vocabulary of 248,077 tokens
    tests/bench/bench_grammar.py FOLDER/qwen [BUILD]

Turns are sampled from the masks: random tokens, and now and then one that leads on. Mask times are processor time of
the thread that computes them; FREE masks, which are not computed, count as the others do.
"""
import json
import pathlib
import subprocess
import sys

STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def obj(required=None, **properties):
    return {"type": "object", "properties": properties, "required": list(properties) if required is None else required}


def tool(name, required=None, **properties):
    return {"type": "function", "function": {"name": name, "parameters": obj(required, **properties)}}


def array(items, **more):
    return {"type": "array", "items": items, **more}


READ = tool("read_file", ["path"], path=STRING, offset={"type": "integer", "minimum": 0}, limit={"type": "integer", "minimum": 1, "maximum": 5000})
WRITE = tool("write_file", path=STRING, content=STRING)
EDIT = tool("edit_file", ["path", "old_string", "new_string"], path=STRING, old_string=STRING, new_string=STRING, replace_all=BOOLEAN)
BASH = tool("bash", ["command"], command=STRING, timeout={"type": "integer", "minimum": 1, "maximum": 600}, description={"type": "string", "maxLength": 120})
GREP = tool("grep", ["pattern"], pattern=STRING, path=STRING, glob=STRING, mode={"enum": ["content", "files_with_matches", "count"]},
            context=INTEGER, ignore_case=BOOLEAN)
GLOB = tool("glob", ["pattern"], pattern=STRING, path=STRING)
TODO = tool("todo_write", todos=array(obj(id=STRING, content={"type": "string", "minLength": 1}, status={"enum": ["pending", "in_progress", "completed"]},
                                          priority={"enum": ["high", "medium", "low"]})))
WEB = tool("web_search", ["query"], query=STRING, max_results={"type": "integer", "minimum": 1, "maximum": 20}, domains=array(STRING, maxItems=10))
FETCH = tool("fetch", ["url"], url={"type": "string", "format": "uri"}, headers={"type": "object", "additionalProperties": STRING})
WEATHER = tool("get_weather", ["city"], city=STRING, unit={"enum": ["celsius", "fahrenheit"]}, days={"type": "integer", "minimum": 1, "maximum": 7})
CALENDAR = tool("create_event", ["title", "start"], title={"type": "string", "maxLength": 200}, start={"type": "string", "format": "date-time"},
                end={"type": "string", "format": "date-time"}, attendees=array({"type": "string", "format": "email"}))
SQL = tool("query", ["sql"], sql=STRING, parameters=array({"type": ["string", "number", "boolean", "null"]}))
TREE = {"$defs": {"node": obj(["name"], name=STRING, children=array({"$ref": "#/$defs/node"}))}, "$ref": "#/$defs/node"}
AGENT = [READ, WRITE, EDIT, BASH, GREP, GLOB, TODO, WEB, FETCH]


def calls(*tools, mode="required", **more):
    return {"calls": mode, "tools": list(tools), **more}


SPECS = {
    "read a file": calls(READ),
    "write a file": calls(WRITE),
    "edit a file": calls(EDIT),
    "shell": calls(BASH),
    "search in files": calls(GREP),
    "list of tasks": calls(TODO),
    "web search": calls(WEB),
    "fetch with headers": calls(FETCH),
    "weather, parallel": calls(WEATHER, parallel=True),
    "calendar": calls(CALENDAR),
    "SQL with parameters": calls(SQL),
    "agent's 9 tools, required": calls(*AGENT),
    "agent's 9 tools, auto, thinking": calls(*AGENT, mode="auto", thinking=True, calls_in_reasoning=True),
    "40 tools": calls(*[{**t, "function": {**t["function"], "name": f"{t['function']['name']}_{i}"}} for i in range(5) for t in AGENT[:8]]),
    "JSON: a person": {"schema": obj(["name"], name=STRING, age={"type": "integer", "minimum": 0, "maximum": 150}, email={"type": "string", "format": "email"}, tags=array(STRING))},
    "JSON: extraction": {"schema": obj(None, entities=array(obj(text=STRING, type={"enum": ["person", "place", "date"]}, start=INTEGER, end=INTEGER)), language={"type": "string", "pattern": "^[a-z]{2}$"})},
    "JSON: steps and answer": {"schema": obj(None, steps=array(obj(explanation=STRING, output=STRING), maxItems=20), final_answer=STRING), "thinking": True},
    "JSON: recursive tree": {"schema": TREE},
    "JSON: identifiers": {"schema": obj(None, id={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_-]{0,63}$"}, key={"type": "string", "format": "uuid"}, score={"type": "number", "minimum": 0, "maximum": 1})},
    "JSON: any object": {"json": True},
}


def main():
    model, build = sys.argv[1], pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else "build")
    lines = "".join(json.dumps({**s, "samples": 12, "seed": 7}) + "\n" for s in SPECS.values())
    p = subprocess.run([build / "engine/delta-grammar", "--model", model], input=lines.encode(), stdout=subprocess.PIPE, check=True)
    print("| schema | compile ms | states | masks | median µs | p99 µs | worst µs | free | cache hits | forced tokens |\n|---|---|---|---|---|---|---|---|---|---|")
    for name, line in zip(SPECS, p.stdout.decode().split("\n")):
        a = json.loads(line)
        if "error" in a or "fault" in a:
            raise SystemExit(f"{name}: {a.get('error', a.get('fault'))}")
        hits = f"{100 * a['cached'] // a['asked']} %" if a["asked"] else "–"
        print(f"| {name} | {a['compile_ms']:.2f} | {a['nodes']} | {a['masks']} | {a['median_us']:.1f} | {a['p99_us']:.0f} | {a['worst_us']:.0f} "
              f"| {100 * a['free'] // a['masks']} % | {hits} | {a['forced']} |")


main()
