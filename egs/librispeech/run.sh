#!/usr/bin/env bash
# LibriSpeech: 960 h of read English by 2,484 speakers, 16 kHz. Licence: CC-BY-4.0. https://www.openslr.org/12
# Needs the folder that holds LibriSpeech: LIBRISPEECH=DIR egs/librispeech/run.sh, or --source DIR, or --download true.
# All 960 h: LIBRISPEECH_SUBSETS="train-clean-100 train-clean-360 train-other-500 dev-clean dev-other test-clean test-other" \
#   egs/librispeech/run.sh --download true --train "train-clean-100 train-clean-360 train-other-500"
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus librispeech --source "${LIBRISPEECH:-data/download/librispeech}" --language en \
  --metric wer --train "train-clean-100" --valid "dev-clean" --test "dev-clean dev-other test-clean test-other" --preset base "$@"
