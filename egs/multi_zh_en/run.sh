#!/usr/bin/env bash
# Multi zh-en: a mixture of prepared corpora to train one model on, about 4,700 h of Mandarin, English and code-switch. Licence: those of its parts. https://arxiv.org/abs/2604.18105
# Get it: prepare each part first, egs/<part>/run.sh --stop-stage 2. MULTI_ZH_EN_TRAIN names parts and weights, MULTI_ZH_EN_VALID what validates.
# Scoring: it has no test set: test the model with egs/<corpus>/run.sh --stage 11 --stop-stage 12 --init exp/multi_zh_en/base/9_phoneme_head.
export MULTI_ZH_EN_TRAIN="${MULTI_ZH_EN_TRAIN:-aishell:train aishell2:train wenetspeech:train_m kespeech:train_phase1 kespeech:train_phase2 \
cs_dialogue:train ascend:train librispeech:train-clean-100 librispeech:train-clean-360 librispeech:train-other-500}"
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus multi_zh_en --source "${MULTI_ZH_EN:-data}" --language zh-en --metric mer \
  --train "$MULTI_ZH_EN_TRAIN sample=0.001" --valid "${MULTI_ZH_EN_VALID:-aishell:dev librispeech:dev-clean ascend:validation}" --test "" \
  --stop-stage 9 --preset base "$@"
