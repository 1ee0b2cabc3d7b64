#!/usr/bin/env bash
# Runs every benchmark, adds the records to results/benchmarks.jsonl and writes the tables of RESULTS.md again. About 15 minutes on a
# laptop's CPU; needs the units of egs/mini (./run.sh --stop-stage 2). Let the machine do nothing else meanwhile.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../path.sh"

record=results/benchmarks.new.jsonl # beside the tracked file, which must stay as it is: records name the commit that they measured
units=data/mini/units
python benchmarks/fbank.py --record "$record"
python benchmarks/train_step.py --record "$record"
python benchmarks/train_step.py --manifest "$units"/{train_phrases,train_sent,train_an4}.jsonl.gz --record "$record"
python benchmarks/encoder_rtf.py --record "$record"
python benchmarks/stream_flat.py --record "$record"
python benchmarks/hotwords.py --record "$record"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then # 80 GB of GPU memory or more
  python benchmarks/train_full_size.py --record "$record"
fi
cat "$record" >>results/benchmarks.jsonl
rm "$record"
python utils/results.py
