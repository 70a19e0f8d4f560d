"""Plays conversations against a target, several at once, and measures what a cold long prompt does to running streams."""
import queue
import random
import threading
import time

import account
import transcript
from generate import Text
from targets import Failed


def play(target, c, o, began, keep):
    """One conversation, turn by turn; keep(sample) takes each. It ends at the first failure."""
    history, before, session, in_session = transcript.history(c), None, None, 0
    calls = []      # ids of the calls of a live answer before
    unsent = list(history)
    was_live = False
    try:
        for i, turn in enumerate(c.turns):
            if turn.pause_s and o["pace"]:
                time.sleep(turn.pause_s * o["pace"])
            new = transcript.for_calls(turn.messages, calls) if was_live else turn.messages
            history += new
            unsent += new
            live = turn.answer == transcript.LIVE
            s = account.Sample(c.name, i, start_s=time.perf_counter() - began, answer_stays=live)
            try:
                if o["mode"] == "session" and session is None:
                    session = target.create_session([], c.tools, turn.thinking)
                ignore_eos = (not live) if o["ignore_eos"] is None else o["ignore_eos"]
                max_tokens = o["max_tokens"] or turn.max_tokens
                a = target.ask(unsent if session else history, c.tools, turn.thinking, max_tokens, session.id if session else "",
                               o["preserve"], ignore_eos, o["options"])
                s.prompt, s.cached, s.completion, s.reasoning = a.prompt, a.cached, a.completion, a.reasoning
                s.arrivals_s, s.total_s = a.arrivals_s, a.total_s
                s.first_s = a.arrivals_s[0] if a.arrivals_s else None
                s.server_first_s, s.reason, s.note = a.server_first_s, a.reason, a.note
                account.count(s, before)
                if s.reprocessed and before and (before.answer_stays or any(m["role"] == "user" for m in new)):
                    # the prompt may have lost tokens (reasoning that the template left out): count what is new alone
                    s.counted = target.count(new if before.answer_stays else [c.turns[i - 1].answer, *new], o["preserve"])
                    account.count(s, before)
                in_session += len(unsent)
                if session and not live:
                    target.rewind(session, in_session)
            except Failed as e:
                s.error = f"{c.name}, turn {i}: {e}"
                keep(s)
                return
            keep(s)
            answer = a.message if live else turn.answer
            calls = [k["id"] for k in answer.get("tool_calls", [])] if live else []
            was_live = live
            history.append(answer)
            # what the next request brings that this one's server has not got
            unsent = [] if live else [answer]
            in_session += live
            before = s
    finally:
        if session:
            target.close_session(session)


def run(make_target, conversations, o, tell=None):
    """(samples in the order of transcript and turn, seconds). make_target: a new connection; o: see replay.py."""
    waiting, samples, lock, broken = queue.SimpleQueue(), [], threading.Lock(), []
    for c in conversations:
        waiting.put(c)

    def keep(s):
        with lock:
            samples.append(s)
            if tell:
                tell(s)

    began = time.perf_counter()

    def work():
        target = make_target()
        try:
            while not broken:
                try:
                    c = waiting.get_nowait()
                except queue.Empty:
                    return
                play(target, c, o, began, keep)
        except BaseException as e:  # an error of this program ends the run, not one thread of it
            broken.append(e)
        finally:
            target.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(o["concurrency"], len(conversations)))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if broken:
        raise broken[0]
    wall = time.perf_counter() - began
    order = {c.name: i for i, c in enumerate(conversations)}
    return sorted(samples, key=lambda s: (order[s.conversation], s.turn)), wall


class Stream(threading.Thread):
    """An answer that runs until it is told to end; arrivals are on time.perf_counter()."""

    def __init__(self, target, messages, max_tokens):
        super().__init__(daemon=True)
        self.target, self.messages, self.max_tokens = target, messages, max_tokens
        self.arrivals, self.error, self.stop = [], "", threading.Event()

    def run(self):
        def piece(at):
            self.arrivals.append(at)
            return self.stop.is_set()
        try:
            self.target.ask(self.messages, [], False, self.max_tokens, ignore_eos=True, options={"temperature": 0}, on_piece=piece)
        except Failed as e:
            self.error = str(e)
        finally:
            self.target.close()


def gaps(arrivals, begin, end):
    """Of one stream: the gaps that lie wholly or in part between two times."""
    return [b - a for a, b in zip(arrivals, arrivals[1:]) if b > begin and a < end]


def cold_prompt(target, text, tokens):
    a = target.ask([{"role": "user", "content": text}], [], False, 1, options={"temperature": 0})
    if a.cached > a.prompt // 2:
        raise Failed(f"the cold prompt was served from the cache ({a.cached} of {a.prompt} tokens): take another --seed")
    if not a.arrivals_s:
        raise Failed("the cold prompt's answer had no token")
    return {"prompt_tokens": a.prompt or tokens, "cached_tokens": a.cached, "first_token_s": a.arrivals_s[0],
            "tokens_per_s": (a.prompt or tokens) / a.arrivals_s[0]}


def interfere(make_target, o, tell=None):
    """Streams run; cold prompts come, one after another. A cold prompt before them, alone, says what it takes without."""
    target = make_target()
    rng = random.Random(f"{o['seed']}/interfere")
    text = Text(rng, o["bytes_per_token"])
    # texts are sized by this server's tokens where it tells them
    probe = target.ask([{"role": "user", "content": text.prose(500)}], [], False, 1)
    short = target.ask([{"role": "user", "content": "x"}], [], False, 1)
    if probe.prompt > short.prompt:
        text.ratio *= 500 / (probe.prompt - short.prompt)
    fresh = lambda: f"{rng.random()} " + text.prose(o["prompt_tokens"])
    alone = cold_prompt(target, fresh(), o["prompt_tokens"])
    streams = [Stream(make_target(), [{"role": "user", "content": text.prose(o["stream_prompt"])}], o["stream_tokens"])
               for _ in range(o["streams"])]
    quiet, loud, cold = [], [], []
    try:
        for s in streams:
            s.start()
        end = time.monotonic() + o["timeout"]
        while any(len(s.arrivals) < 8 for s in streams):
            bad = [s for s in streams if not s.is_alive()]
            if bad:
                raise Failed(f"a stream ended before the cold prompt came: {bad[0].error or 'raise --stream-tokens'}")
            if time.monotonic() > end:
                raise Failed(f"not all of {o['streams']} streams run at once: lower --streams, or raise the server's limit of sequences")
            time.sleep(0.01)
        for _ in range(o["repeat"]):
            t0 = time.perf_counter()
            time.sleep(o["settle"])
            t1 = time.perf_counter()
            cold.append(cold_prompt(target, fresh(), o["prompt_tokens"]))
            t2 = t1 + cold[-1]["first_token_s"]
            time.sleep(0.2)  # the gap that the prompt ended in ends too
            ended = [s for s in streams if not s.is_alive()]
            if ended:
                raise Failed(f"a stream ended while the cold prompt was computed: {ended[0].error or 'raise --stream-tokens'}")
            quiet += [gaps(list(s.arrivals), t0, t1) for s in streams]
            loud += [gaps(list(s.arrivals), t1, t2) for s in streams]
            if tell:
                tell(f"cold prompt {cold[-1]['prompt_tokens']} tokens, first token {1000 * cold[-1]['first_token_s']:.0f} ms")
    finally:
        for s in streams:
            s.stop.set()
        for s in streams:
            s.join(30)
        target.close()
    flat = lambda many: [g for one in many for g in one]
    return {"streams": o["streams"], "alone": alone, "cold": cold,
            "cold_first_token": account.times([x["first_token_s"] for x in cold]),
            "cold_rate_of_alone_percent": account.share(account.percentile([x["tokens_per_s"] for x in cold], 50), alone["tokens_per_s"]),
            "gap_quiet": account.times(flat(quiet)), "gap_during": account.times(flat(loud)),
            "longest_during": account.times([max(g) for g in loud if g])}


def interfere_report(a):
    row = lambda name, t: (name, t["n"], account.ms(t["p50_s"]), account.ms(t["p90_s"]), account.ms(t["p99_s"]), account.ms(t["max_s"]))
    return "\n".join([
        f"{a['streams']} streams, {len(a['cold'])} cold prompts of {a['cold'][0]['prompt_tokens']} tokens", "",
        account.table([row("gap, before the prompt", a["gap_quiet"]), row("gap, during the prompt", a["gap_during"]),
                       row("longest gap of a stream", a["longest_during"]), row("cold first token", a["cold_first_token"])],
                      ["ms", "n", "p50", "p90", "p99", "max"]), "",
        f"cold prompt alone: first token {account.ms(a['alone']['first_token_s'])} ms, {a['alone']['tokens_per_s']:.0f} tokens/s; beside the "
        f"streams {a['cold_rate_of_alone_percent']:.0f} % of that rate"])
