#!/usr/bin/env bash
# WenetSpeech-Yue, test set WSYue-ASR-eval: 9.46 h (short, up to 10 s) and 1.97 h (long, 10 to 30 s) of Cantonese with some English, 16 kHz. Licence: CC-BY-NC-4.0. https://huggingface.co/datasets/ASLP-lab/WSYue-ASR-eval
# Get it: --download true (1.2 GB), or WENETSPEECH_YUE=DIR, which holds Short and Long with their archives unpacked.
# Scoring: CER, mixed units (MER here), since there is English. The references are in traditional script: compare both in one script (stage 12 --profile).
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus wenetspeech_yue --source "${WENETSPEECH_YUE:-data/download/wenetspeech_yue}" \
  --language zh-en --metric mer --train "" --valid "" --test "test_short test_long" --stop-stage 2 --preset base "$@"
