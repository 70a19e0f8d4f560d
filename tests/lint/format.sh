#!/bin/bash
# Every C file has the layout that clang-format 14 gives it; other versions differ in details.
set -uo pipefail
tool=$(command -v clang-format-14 || command -v clang-format)
if ! "$tool" --version 2>/dev/null | grep -q 'version 14\.'; then
    echo "SKIP: there is no clang-format 14"
    exit 0
fi
files=$(git ls-files -co --exclude-standard '*.c' '*.h') && [ -n "$files" ] || exit 1
# shellcheck disable=SC2086 -- names have no blanks
"$tool" --dry-run --Werror $files 2>&1 | grep 'error:' | cut -d: -f1 | sort | uniq -c
[ "${PIPESTATUS[0]}" = 0 ]
