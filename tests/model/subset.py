"""Part of a folder of golden outputs: subset.py GOLDEN OUT MODEL:PROMPT,PROMPT...

Copies the named prompts of each model (entries of X.json, tensors of X.safetensors), the checkpoint folder
if it stands beside them, and the case files. The full outputs are made by engine/demo-model/train/golden.py.
"""
import json, os, shutil, struct, sys


def tensors(path):
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        head = json.loads(f.read(n))
        head.pop("__metadata__", None)
        data = f.read()
    return {k: (v, data[v["data_offsets"][0]:v["data_offsets"][1]]) for k, v in head.items()}


def write(path, items):
    head, at = {}, 0
    for k, (v, b) in items:
        head[k] = {"dtype": v["dtype"], "shape": v["shape"], "data_offsets": [at, at + len(b)]}
        at += len(b)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(b for _, (_, b) in items))


def main():
    src, out = sys.argv[1:3]
    os.makedirs(out, exist_ok=True)
    for name in ("tokenizer_cases.json", "chat_cases.json"):
        shutil.copyfile(os.path.join(src, name), os.path.join(out, name))
    for spec in sys.argv[3:]:
        model, names = spec.split(":")
        names = names.split(",")
        with open(os.path.join(src, model + ".json")) as f:
            doc = json.load(f)
        doc["prompts"] = [p for p in doc["prompts"] if p["name"] in names]
        assert len(doc["prompts"]) == len(names), spec
        with open(os.path.join(out, model + ".json"), "w") as f:
            json.dump(doc, f, ensure_ascii=False, indent=1)
            f.write("\n")
        all_of = tensors(os.path.join(src, model + ".safetensors"))
        write(os.path.join(out, model + ".safetensors"),
              [(k, v) for k, v in all_of.items() if k.split("/")[0] in names])
        folder = os.path.join(src, model)
        if os.path.isdir(folder):
            shutil.copytree(folder, os.path.join(out, model), dirs_exist_ok=True)


main()
