#!/usr/bin/env bash
# MUSAN: 6 h of noise, 42 h of music and 60 h of speech, 16 kHz, to mix into training audio. Licence: CC-BY-4.0. https://www.openslr.org/17
# Needs the folder that holds musan: MUSAN=DIR egs/musan/run.sh, or --source DIR, or --download true. Then, for any corpus:
# --noise "musan:noise musan:music musan:babble". There is nothing to train on here: it ends with stage 2.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus musan --source "${MUSAN:-data/download/musan}" --language en \
  --metric wer --train "" --valid "" --test "" --stop-stage 2 --preset base "$@"
