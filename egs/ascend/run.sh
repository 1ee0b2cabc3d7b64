#!/usr/bin/env bash
# ASCEND: 10.62 h of spontaneous Mandarin-English code-switch conversation, recorded in Hong Kong, 16 kHz. Licence: CC-BY-SA-4.0. https://huggingface.co/datasets/CAiRE/ASCEND
# Get it: fetch the dataset repository at the address (1.2 GB). ASCEND=DIR, which holds main/*.parquet.
# Scoring: mixed units (MER; the paper calls it CER). Its page shows a clip of validation, so say which split a number is of.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus ascend --source "${ASCEND:-data/download/ascend}" --language zh-en --metric mer \
  --train "train" --valid "validation" --test "validation test" --preset base "$@"
