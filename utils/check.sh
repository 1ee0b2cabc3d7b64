#!/usr/bin/env bash
# Everything that has to hold before a commit: style, unit tests, rules about the repository, and the recipe from start to end.
#
#   utils/check.sh           # all of it
#   utils/check.sh --fast    # without the recipe test

set -euo pipefail

tests=(tests)
case "${1:-}" in
  "") ;;
  --fast) tests+=(--ignore=tests/recipe) ;;
  --help | -h)
    sed -n '2,${/^#/!q;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
  *)
    printf '%s: expected --fast, --help or nothing, found %s. Fix: see --help\n' "$0" "$1" >&2
    exit 2
    ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/../path.sh"
. utils/setup_env.sh

say() { printf '%(%H:%M:%S)T check %s\n' -1 "$*"; }
report=$(mktemp)
trap 'rm -f "$report"' EXIT
SECONDS=0

say "style: ruff check, ruff format --check"
code=0
python -m ruff check . && python -m ruff format --check . || code=$?
if [ "$code" != 0 ]; then
  say "ERROR style: the lines above; most are mended by: ruff check --fix . && ruff format ."
  echo "1 failed in $SECONDS.00s"
  exit "$code"
fi

say "tests: ${tests[*]}"
command -v chromium chromium-browser google-chrome >/dev/null || say "the web page is not tested in a browser: there is none. Fix: apt-get install -y chromium"
# A process per core, one thread each: torch's threads of several processes would wait for each other.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile --durations=5 "${tests[@]}" 2>&1 | tee "$report" || code=$?
say "all of it took $((SECONDS / 60)) min $((SECONDS % 60)) s"
tail -n 1 "$report"
exit "$code"
