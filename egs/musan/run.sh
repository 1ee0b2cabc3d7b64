#!/usr/bin/env bash
# MUSAN: 6 h of noise, 42 h of music and 60 h of speech, 16 kHz, to mix into training audio. Licence: CC-BY-4.0. https://www.openslr.org/17
# Get it: --download true (11 GB), or MUSAN=DIR, which holds musan. Then, for any corpus: --noise "musan:noise musan:music musan:babble".
# Scoring: none, nothing is transcribed. There is nothing to train on here either: it ends with stage 2.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus musan --source "${MUSAN:-data/download/musan}" --language en \
  --metric wer --train "" --valid "" --test "" --stop-stage 2 --preset base "$@"
