#!/usr/bin/env bash
# AISHELL6-Whisper: 30 h of whispered and 30 h of normal read Mandarin by 167 speakers, 48 kHz. Licence: CC-BY-NC-SA-4.0, gated. https://zutm.github.io/AISHELL6-Whisper
# Get it: the address leads to the dataset repository; accept its terms, fetch text_sentence and the archives of the splits, and unpack them.
#   AISHELL6_WHISPER=DIR. The video is not needed.
# Scoring: CER, whispered and normal speech apart. Its makers report 4.13 % whispered and 1.11 % normal.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus aishell6_whisper --source "${AISHELL6_WHISPER:-data/download/aishell6_whisper}" \
  --language zh --metric cer --train "train_whisper train_normal" --valid "valid_whisper" --test "test_whisper test_normal" --preset base "$@"
