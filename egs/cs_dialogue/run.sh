#!/usr/bin/env bash
# CS-Dialogue: 104 h of Mandarin-English code-switch dialogues by 200 speakers, 16 kHz. Licence: CC-BY-NC-SA-4.0, gated. https://huggingface.co/datasets/BAAI/CS-Dialogue
# Get it: accept the terms at the address and fetch data/index and data/short_wav; cat data/short_wav/*.tar.gz* | tar xz -C data/short_wav.
#   CS_DIALOGUE=DIR, which holds data.
# Scoring: mixed units, a Chinese character or an English word each (MER; the paper calls it CER).
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus cs_dialogue --source "${CS_DIALOGUE:-data/download/cs_dialogue}" \
  --language zh-en --metric mer --train "train" --valid "dev" --test "test" --preset base "$@"
