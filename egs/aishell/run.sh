#!/usr/bin/env bash
# AISHELL-1: 178 h of read Mandarin by 400 speakers, 16 kHz, 18 h of dev and 10 h of test. Licence: Apache-2.0. https://www.openslr.org/33
# Get it: --download true (15.6 GB), or AISHELL=DIR, which holds data_aishell.
# Scoring: CER. The transcripts have spaces between words, which do not count.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus aishell --source "${AISHELL:-data/download/aishell}" \
  --language zh --metric cer --train "train" --valid "dev" --test "dev test" --preset base "$@"
