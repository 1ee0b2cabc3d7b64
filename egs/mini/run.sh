#!/usr/bin/env bash
# Mini: 4 h of Mandarin-English phrases, joined from recorded words, and read sentences, 16 kHz; noise. Licence: MIT (DSPSpeech-20), Apache-2.0 (AISHELL-1, speaker S0150), AN4 (Carnegie Mellon University); noise CC-BY and others: see NOTICE.
# Get it: it is kept in this repository, in egs/mini/audio.
# Scoring: PER and MER. In test_grammar and test_joins every word is one of words.txt; in test_noise nothing is said.
here=$(dirname "$0")
exec "$here/../../run.sh" --corpus mini --source "$here/audio" --language zh-en --metric mer \
  --train "train_words=0.4 train_phrases=0.8 train_sent=0.15 train_an4" --noise noise --valid dev \
  --test "test_grammar test_joins test_sent test_noise" --closed "test_grammar test_joins" --lexicon "$here/words.txt" \
  --entities "$here/words.txt" --hotword-list "$here/words.txt" "$@"
