"""What one daemon takes for the things that agents do often: a warm turn, a fork, a change of session, many streams. Each figure is
a function of a target (targets.Grpc) and options, and gives a dictionary; report() makes a table of them.

Texts are random words. Lengths are those that the server counts: the words a token are asked for once.
"""
import os
import pathlib
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time

import account
from generate import Text
from targets import Failed

# A user's message of one word: what the template puts around it, and the head of the answer.
WRAP = [{"role": "user", "content": "x"}]


class Maker:
    """Messages of so many tokens, the template's included."""

    def __init__(self, target, seed):
        self.rng = random.Random(f"{seed}/measure")
        self.text = Text(self.rng, 4.0)
        self.around = target.count(WRAP, None) - 1
        sample = self.text.prose(2000)
        self.text.ratio *= 2000 / (target.count([{"role": "user", "content": sample}], None) - self.around)

    def message(self, tokens):
        return {"role": "user", "content": f"{self.rng.random():.6f} " + self.text.prose(max(tokens - self.around - 12, 1))}


def turn(target, session, message, tokens=2):
    a = target.ask([message], [], False, tokens, session=session.id, ignore_eos=True, options={"temperature": 0})
    if not a.arrivals_s:
        raise Failed("an answer had no token")
    return a


def begin(target, maker, tokens):
    """A session of so many tokens, and what the first turn took."""
    s = target.create_session([], [], False)
    a = turn(target, s, maker.message(tokens))
    return s, {"prompt_tokens": a.prompt, "cached_tokens": a.cached, "first_token_s": a.arrivals_s[0],
               "tokens_per_s": (a.prompt - a.cached) / a.arrivals_s[0]}


def warm(target, o):
    """Turns with so many new tokens each behind a session of `context`."""
    maker, out = Maker(target, o["seed"]), {}
    for context in o["context"]:
        s, cold = begin(target, maker, context)
        answers = [turn(target, s, maker.message(o["new"])) for _ in range(o["repeat"] + 1)][1:]
        out[context] = {"cold": cold, "first_token": account.times([a.arrivals_s[0] for a in answers]),
                        "server_first_token": account.times([a.server_first_s for a in answers]),
                        "computed": [a.prompt - a.cached for a in answers]}
        target.close_session(s)
    return out


def fork(target, o):
    """Copies of a session of `context`: the call, and then one turn in all of them at once."""
    maker, out = Maker(target, o["seed"] + 1), {}
    for context in o["context"]:
        s, cold = begin(target, maker, context)
        calls, firsts, computed = [], [], []
        for _ in range(o["repeat"]):
            t0 = time.perf_counter()
            copies = s.fork(o["copies"])
            calls.append(time.perf_counter() - t0)
            answers = together([lambda c=c: turn(target, c, maker.message(32)) for c in copies])
            firsts += [a.arrivals_s[0] for a in answers]
            computed += [a.prompt - a.cached for a in answers]
            for c in copies:
                target.close_session(c)
        out[context] = {"cold": cold, "call": account.times(calls), "first_token": account.times(firsts), "computed": computed}
        target.close_session(s)
    return out


def together(calls):
    out, errors = [None] * len(calls), []

    def one(i):
        try:
            out[i] = calls[i]()
        except Failed as e:
            errors.append(e)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return out


def switch(target, o):
    """As many sessions of `context` as asked for, a turn in one after the other: the least recent one each time."""
    maker, out = Maker(target, o["seed"] + 2), {}
    for context in o["context"]:
        made = []
        for _ in range(o["sessions"]):
            made.append(begin(target, maker, context))
            time.sleep(o["pause"])
        before = target.cache_stats()
        answers = []
        for _ in range(o["repeat"]):
            for s, _ in made:
                time.sleep(o["pause"])
                answers.append(turn(target, s, maker.message(o["new"])))
        after = target.cache_stats()
        out[context] = {"cold": made[-1][1], "sessions": len(made), "first_token": account.times([a.arrivals_s[0] for a in answers]),
                        "computed": [a.prompt - a.cached for a in answers], "before": before, "after": after}
        for s, _ in made:
            target.close_session(s)
    return out


def cpu_s(pid):
    """Processor time of a process so far."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as f:
        words = f.read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def decode(make, o):
    """Streams at once, each behind a prompt of `context`: tokens a second of all together while all run."""
    target, out = make(), {}
    maker = Maker(target, o["seed"] + 3)
    for n in o["streams"]:
        messages = [maker.message(o["context"][0]) for _ in range(n)]
        targets = [make() for _ in range(n)]
        used = cpu_s(o["pid"]) if o["pid"] else 0
        t0 = time.perf_counter()
        begun = [0.0] * n

        def ask(i):
            begun[i] = time.perf_counter()
            return targets[i].ask([messages[i]], [], False, o["tokens"], ignore_eos=True, options={"temperature": o["temperature"]})
        answers = together([lambda i=i: ask(i) for i in range(n)])
        wall = time.perf_counter() - t0
        used = cpu_s(o["pid"]) - used if o["pid"] else None
        times = [[b + x for x in a.arrivals_s] for a, b in zip(answers, begun)]
        first, last = max(t[0] for t in times), min(t[-1] for t in times)
        if last <= first:
            raise Failed(f"not all of {n} streams ran at once: raise --tokens, or the server's limit of sequences")
        count = sum(1 for t in times for x in t if first < x <= last)
        every = [b - a for t in times for a, b in zip(t, t[1:]) if a >= first]
        out[n] = {"tokens_per_s": count / (last - first), "gap": account.times(every), "wall_s": wall,
                  "cpu_s_a_token": None if used is None else used / sum(a.completion for a in answers)}
        for t in targets:
            t.close()
    target.close()
    return out


def start(make, program, log, timeout, leave):
    """Starts a daemon as systemd does: seconds to READY=1, and to the first token of the first answer."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open(log, "ab") as out:
        notify.bind(f"{folder}/notify")
        notify.settimeout(0.2)
        t0 = time.perf_counter()
        d = subprocess.Popen(program, stdout=out, stderr=out, env={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"}, start_new_session=True)
        told = b""
        while b"READY=1" not in told.split(b"\n"):
            try:
                told = notify.recv(4096)
            except socket.timeout:
                if d.poll() is not None:
                    raise Failed(f"{program[0]} ended with {d.returncode}") from None
                if time.perf_counter() - t0 > timeout:
                    d.kill()
                    raise Failed(f"{program[0]} is not ready after {timeout:.0f} s") from None
        ready = time.perf_counter()
        target = make()
        before = time.perf_counter()
        a = target.ask(WRAP, [], False, 1)
        end = time.perf_counter()
        target.close()
        if leave:
            pathlib.Path(leave).write_text(f"{d.pid}\n", encoding="ascii")
        else:
            d.send_signal(signal.SIGTERM)
            d.wait(timeout)
        # what this client takes to be made is not the daemon's
        return {"ready_s": ready - t0, "first_token_s": end - t0 - (before - ready), "prompt_tokens": a.prompt}


def line(name, key, t):
    return (name, str(key), str(t["n"]), account.ms(t["p50_s"]), account.ms(t["p90_s"]), account.ms(t["p99_s"]), account.ms(t["max_s"]))


def report(figures):
    rows, notes = [], []
    for context, f in figures.get("warm", {}).items():
        rows.append(line("warm turn, first token", context, f["first_token"]))
        rows.append(line("the same by the server's clock", context, f["server_first_token"]))
        notes.append(f"warm at {context}: {min(f['computed'])} to {max(f['computed'])} tokens computed; cold {f['cold']['tokens_per_s']:.0f} tokens/s")
    for context, f in figures.get("fork", {}).items():
        rows.append(line("fork, the call", context, f["call"]))
        rows.append(line("first tokens of all copies", context, f["first_token"]))
        notes.append(f"fork at {context}: {min(f['computed'])} to {max(f['computed'])} tokens computed in a copy's turn")
    for context, f in figures.get("switch", {}).items():
        rows.append(line(f"turn of the least recent of {f['sessions']}", context, f["first_token"]))
        notes.append(f"switch at {context}: {min(f['computed'])} to {max(f['computed'])} tokens computed")
    for n, f in figures.get("decode", {}).items():
        rows.append(line("gap, streams", n, f["gap"]))
        cpu = f["cpu_s_a_token"]
        notes.append(f"{n} streams: {f['tokens_per_s']:.0f} tokens/s" + (f", {1e6 * cpu:.0f} us of the daemon's processors a token" if cpu else ""))
    return account.table(rows, ["ms", "of", "n", "p50", "p90", "p99", "max"]) + "\n\n" + "\n".join(notes)
