#!/usr/bin/env bash
# KeSpeech: 1,542 h of Mandarin and eight of its subdialects by 27,237 speakers, 16 kHz, about 31 h of it test. Licence: academic use, on application. https://github.com/KeSpeech/KeSpeech
# Get it: apply at the address. KESPEECH=DIR, which holds KeSpeech (or its folders Audio and Tasks).
# Scoring: CER. <SPOKEN_NOISE> is taken out of the references. Dialects are labelled with Mandarin readings here.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus kespeech --source "${KESPEECH:-data/download/kespeech}" --language zh --metric cer \
  --train "train_phase1 train_phase2" --valid "dev_phase1 dev_phase2" --test "test" --preset base "$@"
