"""Synthetic agent conversations with the lengths of real ones. The same options and seed make the same file.

From a published corpus of agent traces (AgentX 052726 of InferenceX: 472 traces, 113,254 requests) come the lengths of
prompts, CONTEXT; from reports about coding agents the 20 to 25 thousand tokens of system text and tools. All else is an
assumption that an option changes: see README.md. Texts are made of WORDS; no outside data.
"""
import math
import random
from dataclasses import dataclass

from transcript import line

K = 1024
# a conversation's median prompt in tokens: from, to, weight; evenly by its logarithm inside
CONTEXT = [(32 * K, 64 * K, 12), (64 * K, 128 * K, 27), (128 * K, 256 * K, 30), (256 * K, 512 * K, 20), (512 * K, 1024 * K, 10)]

WORDS = """the of and to in is that for with on as are this be it not or from by an if at which when has one can all will more was
file line test error value name type path list call return state read write open close first last next new old same other
number text data code build run time size count index key node tree page list table buffer block queue thread lock event
request answer server client socket message header field option default limit check start stop wait send receive parse
print format string integer pointer memory cache model token layer weight input output result function method class module
import package version update change remove add find search replace match pattern rule case branch merge commit review
should could would must before after while until because only also each every between without inside under over again""".split()
TOOLS = ["read_file", "edit_file", "run_shell", "search_text", "list_folder", "write_file", "fetch_page", "find_files", "apply_patch",
         "run_tests", "show_diff", "ask_user", "make_plan", "start_agent", "stop_process", "read_log", "query_table", "open_page",
         "take_note", "read_note", "format_code", "find_symbol", "rename_symbol", "list_processes"]
EXTENSIONS = ["c", "h", "py", "md", "txt", "json"]
TEMPLATE_TOKENS = 250  # what the chat template itself says about tools
# bytes of a token, as parts of prose's; measured with the vocabulary of Qwen3.6, where numbers are a token a digit
LISTING, SCHEMA = 0.6, 0.7


@dataclass
class Options:
    seed: int = 1
    turns: int = 50              # requests of a conversation
    conversations: int = 8
    system_tokens: int = 22500   # system text and tools
    tools: int = 16
    answer_tokens: int = 180     # median
    loop: float = 12.0           # mean requests for one message of the user
    reasoning: float = 0.4       # of an answer's tokens
    scale: float = 1.0           # of all lengths
    max_context: int = 262144    # longest prompt with its answer, after scaling
    answers: str = "recorded"
    thinking: str = "on"         # on, off, mixed
    own_system: bool = False     # a system text of its own for each conversation
    bytes_per_token: float = 5.2  # of prose: 5.2 with the vocabulary of Qwen3.6


class Text:
    def __init__(self, rng, bytes_per_token):
        self.rng, self.ratio = rng, bytes_per_token

    def words(self, n):
        r = self.rng.random
        return [WORDS[int(r() * len(WORDS))] for _ in range(n)]

    def prose(self, tokens):
        """About that many tokens, in sentences."""
        out, left = [], tokens * self.ratio
        while left > 0 or not out:
            s = " ".join(self.words(4 + int(self.rng.random() * 12))).capitalize() + "."
            out.append(s)
            left -= len(s) + 1
        text = " ".join(out)
        return text[:max(int(tokens * self.ratio), 1)].strip()

    def path(self):
        a, b = self.words(2)
        return f"{a}/{b}_{int(self.rng.random() * 100)}.{EXTENSIONS[int(self.rng.random() * len(EXTENSIONS))]}"

    def listing(self, tokens):
        """As a search or a file comes from a tool."""
        path, out, size, limit, n = self.path(), [], 0, max(int(tokens * self.ratio * LISTING), 1), 1
        while size < limit:
            n += 1 + int(self.rng.random() * 9)
            out.append(f"{path}:{n}: " + " ".join(self.words(3 + int(self.rng.random() * 9))))
            size += len(out[-1]) + 1
        return "\n".join(out)[:limit].strip()


def make_tools(text, count, tokens):
    count = max(min(count, len(TOOLS), tokens // 90), 1)
    out = []
    for name in TOOLS[:count]:
        properties = {"path": {"type": "string", "description": text.prose(6)}, "text": {"type": "string", "description": text.prose(6)}}
        tool = {"type": "function", "function": {"name": name, "description": "", "parameters": {
            "type": "object", "properties": properties, "required": ["path"]}}}
        tool["function"]["description"] = text.prose(max(tokens // count - tool_tokens(tool, text.ratio), 8))
        out.append(tool)
    return out


def tool_tokens(tool, bytes_per_token):
    prose = len(tool["function"]["description"])
    return (prose + (len(line(tool)) - prose) / SCHEMA) / bytes_per_token


def draw_median(rng, o, system):
    """A conversation's median prompt; the distribution is cut at what max_context lets in."""
    top = (o.max_context + system) / 2
    parts = []
    for low, high, weight in CONTEXT:
        low, high = low * o.scale, high * o.scale
        if top > low:
            parts.append((low, min(high, top), weight * math.log(min(high, top) / low) / math.log(high / low)))
    if not parts or top < system * 1.1:
        raise ValueError(f"no conversation of the distribution fits into {o.max_context} tokens: raise --max-context, or lower --scale "
                         "or --system-tokens")
    at = rng.random() * sum(p[2] for p in parts)
    for low, high, weight in parts:
        if at < weight:
            break
        at -= weight
    return max(low * (high / low) ** rng.random(), system * 1.1)


def conversation(o: Options, number: int):
    """The lines of one, as dictionaries."""
    rng = random.Random(f"{o.seed}/{number}")
    text = Text(rng, o.bytes_per_token)
    shared = Text(random.Random(f"{o.seed}/system/{number if o.own_system else ''}"), o.bytes_per_token)
    system = max(int(o.system_tokens * o.scale), 64)
    room = max(system - TEMPLATE_TOKENS, 40)
    tools = make_tools(shared, o.tools, room * 2 // 5)
    used = sum(tool_tokens(t, o.bytes_per_token) for t in tools)
    head = shared.prose(max(room - used, 20))
    system = int(TEMPLATE_TOKENS + used + max(room - used, 20))
    yield {"conversation": f"c{number}", "system": f"{head}\nThe working folder is project_{number}.", "tools": tools,
           "thinking": o.thinking != "off"}

    # What each turn adds: heavy-tailed, and so that the middle turn's prompt is the conversation's median.
    median = draw_median(rng, o, system)
    weights = [rng.lognormvariate(0, 1.2) for _ in range(o.turns)]
    per = (median - system) / sum(weights[:o.turns // 2 + 1])
    answers = [max(int(rng.lognormvariate(math.log(o.answer_tokens * o.scale), 0.8)), 8) for _ in range(o.turns)]
    adds = [w * per for w in weights]
    room = o.max_context - system - answers[-1] - 32 * o.turns
    if sum(adds) > room:
        adds = [a * room / sum(adds) for a in adds]

    calls, before, thinking = 0, 0, o.thinking != "off"
    for i in range(o.turns):
        tokens = max(int(adds[i] - before), 8)
        before = answers[i]
        pause = 0.0
        if calls:
            yield {"tool": text.listing(tokens)}
            pause = rng.lognormvariate(0, 1)
        else:
            yield {"user": text.prose(tokens)}
            pause = rng.lognormvariate(math.log(20), 1) if i else 0.0
            if o.thinking == "mixed":
                thinking = rng.random() < 0.5
        # the loop goes on with a call, or ends and the user comes back
        calls = int(rng.random() >= 1 / o.loop and i + 1 < o.turns)
        record = {"max_tokens": answers[i], "thinking": thinking, "pause_s": round(pause, 3)}
        if o.answers == "live":
            yield {"assistant": "live", **record}
            continue
        thought = int(answers[i] * o.reasoning) if thinking else 0
        answer = {"reasoning": text.prose(thought)} if thought else {}
        if calls:
            name = tools[int(rng.random() * len(tools))]["function"]["name"]
            answer["tool_calls"] = [{"name": name, "arguments": {"path": text.path(), "text": text.prose(max(answers[i] - thought - 16, 2))}}]
        else:
            answer["content"] = text.prose(max(answers[i] - thought, 4))
        yield {"assistant": answer, **record}


def write(o: Options, out):
    for number in range(o.conversations):
        for record in conversation(o, number):
            out.write(line(record))
