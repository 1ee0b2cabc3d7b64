#!/usr/bin/env bash
# LibriSpeech: 960 h of read English by 2,484 speakers, 16 kHz, four dev and test sets of 5 h each. Licence: CC-BY-4.0. https://www.openslr.org/12
# Get it: --download true (8 GB; LIBRISPEECH_SUBSETS names the subsets), or LIBRISPEECH=DIR, which holds LibriSpeech.
# Scoring: WER. References are in capitals, without punctuation and digits.
# All 960 h: LIBRISPEECH_SUBSETS="train-clean-100 train-clean-360 train-other-500 dev-clean dev-other test-clean test-other" \
#   egs/librispeech/run.sh --download true --train "train-clean-100 train-clean-360 train-other-500"
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus librispeech --source "${LIBRISPEECH:-data/download/librispeech}" --language en \
  --metric wer --train "train-clean-100" --valid "dev-clean" --test "dev-clean dev-other test-clean test-other" --preset base "$@"
