#!/usr/bin/env bash
# AISHELL-2021-Eval: Mandarin test sets, hours not published; set C is short commands. Licence: terms on request. https://www.aishelltech.com/aishell_2021_eval
# Get it: ask at the address. AISHELL2021EVAL=DIR, which holds a folder for each set, its name ending in A, C or D. The layout is unverified.
# Scoring: CER. In a short command one error is 10 to 25 % of it, so the interval of set C is wide.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus aishell2021eval --source "${AISHELL2021EVAL:-data/download/aishell2021eval}" \
  --language zh --metric cer --train "" --valid "" --test "test_a test_c test_d" --stop-stage 2 --preset base "$@"
