#!/usr/bin/env bash
# VoxPopuli, transcribed English: 543 h of speeches in the European Parliament, 16 kHz, about 4.9 h each of dev and test. Licence: CC0-1.0. https://github.com/facebookresearch/voxpopuli
# Get it: --download true (dev and test, about 1 GB), or VOXPOPULI=DIR with asr_<split>.tsv and the audio below. train: as the address says.
# Scoring: WER against normalized_text. The references are edited minutes and differ from what is said; a cleaned test set exists elsewhere.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus voxpopuli --source "${VOXPOPULI:-data/download/voxpopuli}" \
  --language en --metric wer --train "train" --valid "dev" --test "dev test" --preset base "$@"
