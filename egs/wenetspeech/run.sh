#!/usr/bin/env bash
# WenetSpeech: 10,005 h of Mandarin from videos and podcasts, 16 kHz; subsets of 1,000 h (M) and 100 h (S); tests of 23 h (net) and 15 h (meeting). Licence: non-commercial, on application; annotations CC-BY-4.0. https://github.com/wenet-e2e/WenetSpeech
# Get it: the form at the address gives a password. WENETSPEECH=DIR, which holds WenetSpeech.json and audio/. WENETSPEECH_TRAIN=s, m or l.
# Scoring: CER. Some short references of test_net are wrong; the paper leaves that set out of its hallucination rates.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus wenetspeech --source "${WENETSPEECH:-data/download/wenetspeech}" --language zh \
  --metric cer --train "train_${WENETSPEECH_TRAIN:-m}" --valid "dev" --test "test_net test_meeting" --preset base "$@"
