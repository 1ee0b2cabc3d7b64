#!/usr/bin/env bash
# AISHELL-1: 178 h of read Mandarin by 400 speakers, 16 kHz. Licence: Apache-2.0. https://www.openslr.org/33
# Needs the folder that holds data_aishell: AISHELL=DIR egs/aishell/run.sh, or --source DIR, or --download true.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus aishell --source "${AISHELL:-data/download/aishell}" \
  --language zh --metric cer --train "train" --valid "dev" --test "dev test" --preset base "$@"
