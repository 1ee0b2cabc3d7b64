#!/usr/bin/env bash
# Runs every benchmark, adds the records to results/benchmarks.jsonl and writes the tables of RESULTS.md again. About 30 minutes on a
# laptop's CPU; needs the recipe of egs/mini (./run.sh). Let the machine do nothing else meanwhile.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../path.sh"

record=results/benchmarks.new.jsonl # beside the tracked file, which must stay as it is: records name the commit that they measured
units=data/mini/units
model=exp/mini/base/9_phoneme_head
python benchmarks/fbank.py --record "$record"
python benchmarks/scoring.py --record "$record"
python benchmarks/train_step.py --record "$record"
python benchmarks/train_step.py --manifest "$units"/{train_phrases,train_sent,train_an4}.jsonl.gz --record "$record"
python benchmarks/encoder_rtf.py --record "$record"
python benchmarks/exported.py --model "$model" --manifest "$units"/test_{grammar,joins}.jsonl.gz --limit 40 --record "$record"
python benchmarks/stream_flat.py --record "$record"
python benchmarks/hotwords.py --record "$record"
python benchmarks/streaming.py --model "$model" --device cpu --record "$record"
python benchmarks/streams_held.py --model "$model" --device cpu --streams 16 8 --most 64 --record "$record"
python benchmarks/serve_load.py --model "$model" --record "$record"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then # 80 GB of GPU memory or more
  python benchmarks/train_full_size.py --record "$record"
  python benchmarks/streaming.py --device cuda --record "$record"
  python benchmarks/streams_held.py --device cuda --record "$record"
  python benchmarks/decode_speed.py --device cuda --record "$record"
  python benchmarks/encoder_step.py --device cuda --record "$record"
fi
cat "$record" >>results/benchmarks.jsonl
rm "$record"
python utils/results.py
