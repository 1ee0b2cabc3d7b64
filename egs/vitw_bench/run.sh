#!/usr/bin/env bash
# Voices-in-the-Wild-Bench: 5,000 clips, Mandarin and English, in noise, far field, echo, dropouts and mixtures: 1,500 recorded, 3,500 simulated; hours not published. Licence: as the dataset card says (MIT and Apache-2.0 are reported). https://huggingface.co/datasets/zhifeixie/Voices-in-the-Wild-Bench
# Get it: fetch the dataset repository at the address. VITW_BENCH=DIR, which holds data/*.parquet.
# Scoring: CER for zh, WER for en, both as mixed units (MER). Recorded and simulated clips apart: references of simulated ones are said to be partial.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus vitw_bench --source "${VITW_BENCH:-data/download/vitw_bench}" --language zh-en \
  --metric mer --train "" --valid "" --test "test_real_zh test_real_en test_sim_zh test_sim_en" --stop-stage 2 --preset base "$@"
