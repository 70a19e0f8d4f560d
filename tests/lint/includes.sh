#!/bin/bash
# Which way includes may point, and what the engine may not do, as docs/ARCHITECTURE.md has it.
# Prints each line that breaks a rule.
set -uo pipefail
bad=0
list() { git ls-files -co --exclude-standard -- "$@" 2>/dev/null; }

# rule TEXT PATTERN FILE...: no line of the files matches
rule() {
    local text=$1 pattern=$2
    shift 2
    [ $# -gt 0 ] || return 0
    if grep -nE "$pattern" "$@" /dev/null; then
        echo "^ $text"
        bad=1
    fi
}
# includes TEXT ALLOWED FILE...: every #include "..." of the files matches ALLOWED
includes() {
    local text=$1 allowed=$2
    shift 2
    [ $# -gt 0 ] || return 0
    if grep -nE '^#include "' "$@" /dev/null | grep -vE "#include \"($allowed)"; then
        echo "^ $text"
        bad=1
    fi
}

mapfile -t engine < <(list 'engine/*.c' 'engine/*.h' 'engine/*.cu' 'engine/*.cuh')
mapfile -t engine_lib < <(printf '%s\n' "${engine[@]}" | grep -v '^engine/tools/')
mapfile -t no_cuda < <(printf '%s\n' "${engine[@]}" | grep -vE '\.cuh?$|^engine/backend/cuda/')
mapfile -t base < <(list 'engine/base/*')
mapfile -t public < <(list 'engine/include/*')
mapfile -t lower < <(list 'engine/sched/*' 'engine/tokenizer/*' 'engine/chat/*' 'engine/grammar/*' 'engine/base/*')
mapfile -t model < <(list 'engine/model/*')
mapfile -t daemon < <(list 'daemon/*.c' 'daemon/*.h')
mapfile -t daemon_no_grpc < <(printf '%s\n' "${daemon[@]}" | grep -v '^daemon/grpc/')
mapfile -t daemon_no_codec < <(printf '%s\n' "${daemon[@]}" | grep -v '^daemon/codec')
mapfile -t clients < <(list 'clients/*.c' 'clients/*.h')

rule 'the engine knows no client and no transport' \
    '#include [<"](uv\.h|grpc/|protobuf-c|systemd/|.*\.pb-c\.h)' "${engine[@]}"
rule 'the engine never prints, exits or reads the environment' \
    '(^|[^_a-zA-Z])(printf|fprintf|vfprintf|puts|fputs|perror|exit|_exit|abort|getenv|secure_getenv)\(' \
    "${engine_lib[@]}"
rule 'CUDA headers are for .cu files and backend/cuda/' '#include [<"]cuda' "${no_cuda[@]}"
includes 'base includes base and the public error list' 'base/|delta/error\.h' "${base[@]}"
includes 'public headers include public headers' 'delta/' "${public[@]}"
rule 'sched, tokenizer, chat, grammar and base know no backend' \
    '#include "(backend|kernels|model|cache|api)/' "${lower[@]}"
rule 'model knows neither sched, cache nor api' '#include "(sched|cache|api)/' "${model[@]}"
while IFS= read -r folder; do
    op=${folder#engine/kernels/}
    mapfile -t files < <(list "$folder/*")
    includes "an op includes itself, common/, the backend and base" \
        "kernels/$op/|kernels/common/|kernels/ops\.h|backend/backend\.h|base/|delta/error\.h|[a-z0-9_]+\.h\"" "${files[@]}"
done < <(list 'engine/kernels/*' | grep -E '^engine/kernels/[a-z_]+/' | cut -d/ -f1-3 | sort -u)
includes 'the daemon sees of the engine only delta/ and base/' \
    'daemon/|delta/|base/|[a-z0-9_/.]+\.pb-c\.h' "${daemon[@]}"
rule "gRPC's headers are for daemon/grpc/ alone" '#include <grpc/' "${daemon_no_grpc[@]}"
rule 'generated protobuf headers are for daemon/codec* and clients/' \
    '#include .*\.pb-c\.h' "${daemon_no_codec[@]}"
rule 'a transport knows no other transport' '#include "daemon/ttrpc/' $(list 'daemon/grpc/*')
rule 'a transport knows no other transport' '#include "daemon/grpc/' $(list 'daemon/ttrpc/*')
rule 'clients know neither engine nor daemon (base/ excepted)' \
    '#include "(daemon/|model/|api/|kernels/|backend/|cache/|sched/|sample/|tokenizer/)' "${clients[@]}"
rule 'nothing sees the tests' '#include "(tests|support)/' "${engine[@]}" "${daemon[@]}" "${clients[@]}"

# Every header compiles alone as C, the public ones of the engine as C++ too.
flags=(-I. -Iengine -Iengine/include -Iclients/c "-I${DELTA_BUILD:-build}/proto" -D_GNU_SOURCE -Wall
    -Wextra -Werror -fsyntax-only)
alone() {
    local header=$1
    shift
    if ! printf '#include "%s"\n' "$PWD/$header" | "$@" "${flags[@]}" -; then
        echo "^ $header does not compile alone"
        return 1
    fi
}
for header in $(list 'engine/*.h' 'daemon/*.h' 'clients/*.h'); do
    alone "$header" cc -std=gnu17 -x c || bad=1
done
if command -v c++ >/dev/null; then
    for header in "${public[@]}"; do
        alone "$header" c++ -x c++ || bad=1
    done
fi
exit $bad
