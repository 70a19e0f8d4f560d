#!/bin/bash
# The manual pages are without a warning of mandoc.
set -u # not pipefail: what mandoc says counts, not its status
if ! command -v mandoc >/dev/null; then
    echo "SKIP: there is no mandoc"
    exit 0
fi
pages=(docs/man/*.[1-8])
[ -f "${pages[0]}" ] || exit 0
if mandoc -Tlint -Wstyle "${pages[@]}" 2>&1 |
    grep -vE 'referenced manual not found|outdated mandoc.db' | grep .; then
    exit 1
fi
exit 0
