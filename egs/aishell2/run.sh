#!/usr/bin/env bash
# AISHELL-2: 1,000 h of read Mandarin by 1,991 speakers, 16 kHz, with 2 + 4 h of dev and test per channel. Licence: academic use, on application. https://www.aishelltech.com/aishell_2
# Get it: apply at the address; the dev and test package has an address of its own there. AISHELL2=DIR, which holds AISHELL-2 and
#   AISHELL-DEV-TEST-SET, with the archives of the speakers unpacked.
# Scoring: CER. The tables of the paper have iOS dev and test; dev_android, test_android, dev_mic and test_mic are read where they are there.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus aishell2 --source "${AISHELL2:-data/download/aishell2}" \
  --language zh --metric cer --train "train" --valid "dev" --test "dev test" --preset base "$@"
