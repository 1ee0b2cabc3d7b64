#!/usr/bin/env bash
# WenetSpeech-Chuan, test set WSC-Eval-ASR: 8.55 h (easy) and 1.15 h (hard) of Sichuanese from the net, 16 kHz. Licence: CC-BY-NC-4.0. https://huggingface.co/datasets/ASLP-lab/WSC-Eval
# Get it: fetch the dataset repository at the address. WENETSPEECH_CHUAN=DIR, which holds WSC-Eval-ASR.
# Scoring: CER. Asterisks and brackets are taken out of the references, as its readme asks. Dialect words are written as they are said.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus wenetspeech_chuan --source "${WENETSPEECH_CHUAN:-data/download/wenetspeech_chuan}" \
  --language zh --metric cer --train "" --valid "" --test "test_easy test_hard" --stop-stage 2 --preset base "$@"
