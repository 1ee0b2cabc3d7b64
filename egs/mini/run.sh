#!/usr/bin/env bash
# Mini: a few hours of read speech kept in this repository; runs on a laptop's CPU. Mandarin-English, 16 kHz.
# Licences: MIT (DSPSpeech-20), Apache-2.0 (AISHELL-1, speaker S0150), AN4 (Carnegie Mellon University); see NOTICE.
here=$(dirname "$0")
exec "$here/../../run.sh" --corpus mini --source "$here/audio" --language zh-en --metric mer \
  --train "train_phrases train_sent train_an4" --valid dev --test "test_grammar test_joins test_sent" \
  --closed "test_grammar test_joins" --lexicon "$here/words.txt" "$@"
