#!/bin/bash
# What the .proto files must keep away from: protobuf-c refuses proto3 "optional" (presence is a
# oneof of one member) and has no depth limit (no recursive messages); maps have traps of their own.
set -uo pipefail
bad=0
if grep -nE '^[[:space:]]*optional[[:space:]]' $(git ls-files -co --exclude-standard '*.proto'); then
    echo "proto3 optional: write oneof x_opt { T x = N; }"
    bad=1
fi
if grep -nE '^[[:space:]]*map[[:space:]]*<' proto/deltad/v1/*.proto; then
    echo "maps are not used"
    bad=1
fi
/usr/bin/python3 - proto <<'PY' || bad=1
import glob, os, subprocess, sys, tempfile
from google.protobuf import descriptor_pb2
root = sys.argv[1]
files = [os.path.relpath(f, root) for f in glob.glob(root + "/**/*.proto", recursive=True)]
with tempfile.NamedTemporaryFile() as out:
    subprocess.run(["protoc", "-I" + root, "--include_imports", "--descriptor_set_out=" + out.name,
                    *files], check=True)
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(open(out.name, "rb").read())
uses = {}
def walk(prefix, message):
    name = prefix + "." + message.name
    uses[name] = {f.type_name for f in message.field if f.type_name}
    for nested in message.nested_type:
        walk(name, nested)
for file in descriptors.file:
    for message in file.message_type:
        walk("." + file.package if file.package else "", message)
def recursive(name, above):
    if name in above:
        return above[above.index(name):] + [name]
    for other in sorted(uses.get(name, ())):
        found = recursive(other, above + [name])
        if found:
            return found
for name in sorted(uses):
    found = recursive(name, [])
    if found:
        sys.exit("recursive message: " + " -> ".join(found))
assert uses, "no messages found"
PY
exit $bad
