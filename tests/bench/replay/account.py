"""What the numbers of turns amount to: new and reprocessed tokens, times, gaps; the report.

A prompt is made of what the turn before had computed already (its prompt, and its answer if that stays in the history), of
what is new, and, in a server that forgets or a template that moves the past, of tokens that are computed once more:

    new         = max(prompt - (prompt + completion - 1 of the turn before), tokens of the new messages if they were counted)
    reprocessed = max(prompt - cached - new, 0)

The last token of an answer was sampled and not computed: it is new in the next turn. A recorded answer is put into the history in place of the generated one: then the completion does not count, and its tokens
are new ones of the next turn. In a conversation's first turn all is new.
"""
import math
from dataclasses import asdict, dataclass, field
from typing import List, Optional


@dataclass
class Sample:
    """One turn, as the server counted it and as this client's clock saw it."""
    conversation: str
    turn: int                           # from 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    answer_stays: bool = True           # the history has the generated answer
    counted: Optional[int] = None       # tokens of the new messages alone
    new: int = 0
    reprocessed: int = 0
    start_s: float = 0.0                # since the run began
    first_s: Optional[float] = None     # from sending to the first token; None: no token came
    total_s: float = 0.0
    arrivals_s: List[float] = field(default_factory=list)  # of pieces with tokens, since the request was sent
    server_first_s: Optional[float] = None
    reason: str = ""
    note: str = ""                      # why not more was cached, as the server says
    error: str = ""

    @property
    def gaps(self):
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:])]


def count(s: Sample, before: Optional[Sample]):
    """Fills new and reprocessed."""
    if before is None:
        s.new = s.prompt
    else:
        had = before.prompt + (max(before.completion - 1, 0) if before.answer_stays else 0)
        s.new = min(max(s.prompt - had, s.counted or 0, 0), s.prompt)
    s.reprocessed = max(s.prompt - s.cached - s.new, 0)


def percentile(values, p):
    """The nearest rank; None of nothing."""
    values = sorted(values)
    return values[max(math.ceil(p / 100 * len(values)), 1) - 1] if values else None


def share(part, whole):
    return 100 * part / whole if whole else 0.0


def times(values):
    return {"n": len(values), "p50_s": percentile(values, 50), "p90_s": percentile(values, 90), "p99_s": percentile(values, 99),
            "max_s": max(values, default=None)}


def summary(samples, wall_s):
    good = [s for s in samples if not s.error]
    cold = [s for s in good if s.turn == 0]
    warm = [s for s in good if s.turn > 0]
    first = lambda some: times([s.first_s for s in some if s.first_s is not None])
    total = lambda name, some=good: sum(getattr(s, name) for s in some)
    # of one stream, without its first token
    rates = [(s.completion - 1) / (s.arrivals_s[-1] - s.arrivals_s[0]) for s in good
             if s.completion > 1 and len(s.arrivals_s) > 1 and s.arrivals_s[-1] > s.arrivals_s[0]]
    notes = {}
    for s in good:
        if s.reprocessed:
            key = "".join("N" if ch.isdigit() else ch for ch in s.note) or "(no word from the server)"
            while "NN" in key:
                key = key.replace("NN", "N")
            n = notes.setdefault(key, {"turns": 0, "tokens": 0})
            n["turns"] += 1
            n["tokens"] += s.reprocessed
    sizes = {}
    for s in warm:
        if s.first_s is not None:
            sizes.setdefault(1 << max(s.prompt - 1, 1).bit_length(), []).append(s)
    return {
        "conversations": len({s.conversation for s in samples}), "turns": len(good), "failed": len(samples) - len(good),
        "errors": sorted({s.error for s in samples if s.error}), "wall_s": wall_s,
        "prompt_tokens": total("prompt"), "cached_tokens": total("cached"), "new_tokens": total("new"),
        "reprocessed_tokens": total("reprocessed"), "output_tokens": total("completion"), "reasoning_tokens": total("reasoning"),
        "cached_percent": share(total("cached"), total("prompt")),
        "reprocessed_percent": share(total("reprocessed"), total("prompt")),
        "warm_cached_percent": share(total("cached", warm), total("prompt", warm)),
        "cold_first_token": first(cold), "warm_first_token": first(warm),
        "warm_first_token_by_prompt": [
            {"prompt_below": size, "new_p50": percentile([s.new for s in some], 50), **first(some)} for size, some in sorted(sizes.items())],
        "output_tokens_per_s": total("completion") / wall_s if wall_s else 0.0,
        "stream_tokens_per_s_p50": percentile(rates, 50),
        "longest_gap": times([max(s.gaps) for s in good if s.gaps]),
        "gap": times([g for s in good for g in s.gaps]),
        "reprocessed_by_note": notes,
    }


def ms(x):
    return "-" if x is None else f"{1000 * x:.1f}"


def table(rows, head):
    rows = [head, *[[str(x) for x in r] for r in rows]]
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(r, widths))).rstrip() for r in rows)


def report(a):
    """The summary as text for people."""
    tokens = [(name, a[key], f"{share(a[key], a['prompt_tokens']):.2f}") for name, key in
              (("prompt", "prompt_tokens"), ("cached", "cached_tokens"), ("new", "new_tokens"), ("reprocessed", "reprocessed_tokens"))]
    row = lambda name, t: (name, t["n"], ms(t["p50_s"]), ms(t["p90_s"]), ms(t["p99_s"]), ms(t["max_s"]))
    lines = [f"{a['conversations']} conversations, {a['turns']} turns in {a['wall_s']:.1f} s" +
             (f", {a['failed']} failed" if a["failed"] else ""), "",
             table(tokens, ["tokens", "sum", "% of prompt"]), "",
             table([row("first token, cold", a["cold_first_token"]), row("first token, warm", a["warm_first_token"]),
                    row("gap between tokens", a["gap"]), row("longest gap of a stream", a["longest_gap"])],
                   ["ms", "n", "p50", "p90", "p99", "max"])]
    if len(a["warm_first_token_by_prompt"]) > 1:
        lines += ["", table([(f"<= {b['prompt_below']}", b["n"], b["new_p50"], ms(b["p50_s"]), ms(b["p99_s"]))
                             for b in a["warm_first_token_by_prompt"]],
                            ["warm first token, prompt", "n", "new p50", "ms p50", "ms p99"])]
    rate = a["stream_tokens_per_s_p50"]
    lines += ["", f"output {a['output_tokens']} tokens, {a['output_tokens_per_s']:.1f} tokens/s; one stream p50 "
              f"{'-' if rate is None else format(rate, '.1f')} tokens/s"]
    for note, n in sorted(a["reprocessed_by_note"].items(), key=lambda x: -x[1]["tokens"])[:8]:
        lines.append(f"reprocessed {n['tokens']} in {n['turns']} turns: {note}")
    lines += [f"error: {e}" for e in a["errors"][:8]]
    return "\n".join(lines)


def as_dict(s: Sample):
    return asdict(s)
