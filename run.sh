#!/usr/bin/env bash
# NIM4-ASR from audio to a scored recogniser, stage by stage. Plain ./run.sh does all of it on egs/mini, on a laptop's CPU.
#
#   ./run.sh                                                  # the embedded corpus, every stage
#   ./run.sh --corpus aishell --source DIR --stage 1          # the same as egs/aishell/run.sh --source DIR --stage 1
#   ./run.sh --only 3 --tag plain --set train.cr_weight=0     # one stage, another setting, results in exp/mini/plain
#
# A stage whose inputs and settings have not changed is skipped. A relative path is looked for where you stand, then in the
# repository; a new --data-dir or --exp-dir is made where you stand. Environment, if there is none: .venv, made at the first start.

set -euo pipefail

# What to run
corpus=mini                         # folder of egs/, whose run.sh gives the facts from --source to --lexicon
stage=0                             # first stage to run
stop_stage=12                       # last stage to run
only=                               # the one stage to run, instead of the two above
tag=base                            # name of the experiment: results go to EXP_DIR/CORPUS/TAG
preset=mini                         # size of model and training: local/conf/{model,train}/PRESET.yaml
set=()                              # KEY=VALUE on top of the training settings, e.g. train.cr_weight=0
init=                               # model folder that training starts from, or that decoding reads when stage 3 is not run
decode="ctc_greedy ctc_streaming"   # decode configurations, files of local/conf/decode/

# The corpus
source=                             # folder with the corpus as it is published
download=false                      # true: fetch the corpus into --source first
limit=                              # utterances kept per split, spread evenly; none = all, with --preset ci 24
language=                           # zh, en or zh-en
train=                              # splits to train on, CORPUS:SPLIT=WEIGHT for a mixture
noise=                              # splits whose recordings are mixed into the training audio, e.g. "musan:noise musan:music musan:babble"
valid=                              # splits to validate on
test=                               # splits to decode and score
metric=mer                          # beside the phoneme error rate: cer (characters), wer (words) or mer (mixed)
closed=                             # test splits in which every word is one of --lexicon
lexicon=                            # word list of the closed splits, one word per line
speed_perturb=false                 # true: train also on copies at 0.9 and 1.1 times the speed

# The machine
device=auto                         # cpu, cuda or auto
launch=python                       # what starts training, e.g. "torchrun --nproc-per-node 8"
jobs=                               # processes that compute features; none = one per core, at most 8
executor=                           # Dask scheduler that computes features instead, tcp://HOST:PORT
data_dir=data                       # where manifests, features and units go
exp_dir=exp                         # where models, hypotheses and scores go

. "$(dirname "${BASH_SOURCE[0]}")/utils/parse_options.sh"

if [ -z "$language" ]; then # the corpus knows its own facts: its run.sh starts this script again, with them
  egs=$(dirname "${BASH_SOURCE[0]}")/egs
  corpora=$(cd -- "$egs" && echo */run.sh)
  [ -f "$egs/$corpus/run.sh" ] || usage_error "--corpus" "a folder of egs/" "'$corpus'" "$(did_you_mean "$corpus" ${corpora//\/run.sh/})"
  [ -z "${RUN_USER_ARGS:-}" ] || usage_error "egs/$corpus/run.sh" "--language" "none" "add it to that file"
  RUN_USER_ARGS=$# exec "$egs/$corpus/run.sh" "$@"
fi

. "$(dirname "${BASH_SOURCE[0]}")/utils/stage.sh"
. "$(dirname "${BASH_SOURCE[0]}")/path.sh" # from here on in the repository's root

source=$(caller_path "$source") lexicon=$(caller_path "$lexicon") init=$(caller_path "$init")
[ "$data_dir" = data ] || data_dir=$(caller_path "$data_dir" new)
[ "$exp_dir" = exp ] || exp_dir=$(caller_path "$exp_dir" new)
[ "$preset" != ci ] || limit=${limit:-24} # the tests want a minute, not a result
data=$data_dir/$corpus
own_train=$(printf '%s\n' $train | sed -nE "s/^($corpus:)?([^:=]+)(=.*)?$/\\2/p" | paste -sd ' ') # without weights and other corpora
exp=$exp_dir/$corpus/$tag

model=$exp/3_pretrain
if stage_selected 3; then
  for part in model train; do
    presets=$(cd "local/conf/$part" && echo *.yaml)
    [ -f "local/conf/$part/$preset.yaml" ] || usage_error "--preset" "a file of local/conf/$part/" "'$preset'" "$(did_you_mean "$preset" ${presets//.yaml/})"
  done
elif [ ${#set[@]} -gt 0 ]; then
  usage_error "--set ${set[0]}" "a stage that trains" "stages $stage to $stop_stage" "add stage 3: the model folder keeps its settings"
elif [ -n "$init" ]; then
  stage_selected 11 || usage_error "--init" "a stage that trains or decodes" "stages $stage to $stop_stage" "leave it out"
  model=$init
fi

. utils/setup_env.sh

if stage 0 prepare "$corpus as published -> manifests of its splits, checked"; then
  python local/00_prepare.py --corpus "$corpus" --source "$source" --out "$data/manifests" --download "$download" ${limit:+--limit "$limit"}
fi

if stage 1 fbank "80 log-Mel bins every 10 ms, and their mean and variance"; then
  python local/01_fbank.py --manifests "$data/manifests" --out "$data/fbank" --cmvn-splits "$own_train" \
    --speed-perturb "$speed_perturb" ${jobs:+--jobs "$jobs"} ${executor:+--executor "$executor"}
fi

if stage 2 units "transcripts -> phonemes: what the encoder learns to write"; then
  python local/02_units.py --fbank "$data/fbank" --out "$data/units" --train-splits "$own_train" --language "$language"
fi

if stage 3 pretrain "CR-CTC pre-training of the encoder and its phoneme head"; then
  $launch local/03_pretrain.py --units "$data/units" --cmvn "$data/fbank/cmvn.json" \
    --model-config "local/conf/model/$preset.yaml" --train-config "local/conf/train/$preset.yaml" \
    --train "$train" --noise "$noise" --valid "$valid" --out "$model" --device "$device" ${init:+--init "$init"} "${set[@]/#/--set=}"
fi

if stage 11 decode "$decode on $test"; then
  python local/11_decode.py --model "$model" --units "$data/units" --test "$test" --configs "$decode" \
    --closed "$closed" --lexicon "$lexicon" --out "$exp/11_decode" --device "$device"
fi

if stage 12 score "error rates with intervals, speed and latency"; then
  python local/12_score.py --decode "$exp/11_decode" --out "$exp/12_score" --metric "$metric"
fi

end_stages
if stage_selected 12; then python utils/compare.py "$exp"; fi
