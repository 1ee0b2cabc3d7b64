#!/usr/bin/env bash
# NIM4-ASR from audio to a scored recogniser, stage by stage. Plain ./run.sh does all of it on egs/mini, on a laptop's CPU.
#
#   ./run.sh                                                  # the embedded corpus, every stage
#   ./run.sh --corpus aishell --source DIR --stage 1          # the same as egs/aishell/run.sh --source DIR --stage 1
#   ./run.sh --only 3 --tag plain --set train.cr_weight=0     # one stage, another setting, results in exp/mini/plain
#   ./run.sh --stage 6 --init exp/mini/base/4_align --tag no_ia_sft     # an ablation: from alignment to joint training, without stage 5
#
# A stage whose inputs and settings have not changed is skipped. A relative path is looked for where you stand, then in the
# repository; a new --data-dir or --exp-dir is made where you stand. Environment, if there is none: .venv, made at the first start.

set -euo pipefail

# What to run
corpus=mini                         # folder of egs/, whose run.sh gives the facts from --source to --lexicon
stage=0                             # first stage to run
stop_stage=13                       # last stage to run
only=                               # the one stage to run, instead of the two above
tag=base                            # name of the experiment: results go to EXP_DIR/CORPUS/TAG
preset=mini                         # size of model and training: local/conf/{model,train}/PRESET.yaml
encoder=conformer                   # conformer or zipformer, of the preset's size: local/conf/model/PRESET_zipformer.yaml
set=()                              # KEY=VALUE on top of stage 3's settings, e.g. train.cr_weight=0; of a later one with its name: grpo.train.max_steps=10
init=                               # model folder that the first training stage starts from, or that decoding reads when none is run
init_encoder=                       # published encoder that stage 3 or 4 starts from: icefall:FILE, icefall:FILE,avg=N or firered:FOLDER
snapshots=                          # folder of stage 3 whose encoders stage 5 takes up; none = this experiment's
entities=                           # word list of names for stage 7, one per line; none = what its rules find in the transcripts
decode="ctc_greedy ctc_streaming offline offline_rescored streaming"   # decode configurations, files of local/conf/decode/
hotword_list=                       # word list of names for stage 10: the index in which decode configs with hotwords look up hints
ngram=0                             # words in the longest n-gram of the training transcripts, for decode configs ctc_beam and ctc_beam_phones; 0 = none
arpa=                               # n-gram for them instead, an ARPA file
hotwords=                           # words separated by commas: hints to the speech LLM in stage 11

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
profile=plain                       # what texts go through before that is counted: plain, fair, page, speechio, openasr or raw
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

source=$(caller_path "$source") lexicon=$(caller_path "$lexicon") init=$(caller_path "$init") entities=$(caller_path "$entities")
hotword_list=$(caller_path "$hotword_list") arpa=$(caller_path "$arpa") snapshots=$(caller_path "$snapshots")
[ -z "$init_encoder" ] || init_encoder=${init_encoder%%:*}:$(caller_path "${init_encoder#*:}" new)
[ "$data_dir" = data ] || data_dir=$(caller_path "$data_dir" new)
[ "$exp_dir" = exp ] || exp_dir=$(caller_path "$exp_dir" new)
[ "$preset" != ci ] || limit=${limit:-24} # the tests want a minute, not a result
data=$data_dir/$corpus
own_train=$(printf '%s\n' $train | sed -nE "s/^($corpus:)?([^:=]+)(=.*)?$/\\2/p" | paste -sd ' ') # without weights and other corpora
exp=$exp_dir/$corpus/$tag

# Training stages: each starts from the one before, the first of this run from --init when that is given. own_set holds each one's --set.
trained=(3_pretrain 4_align 5_ia_sft 6_joint_sft 7_context_sft 8_grpo 9_phoneme_head)
first_trained=
for folder in "${trained[@]}"; do
  if [ -z "$first_trained" ] && stage_selected "${folder%%_*}"; then first_trained=$folder; fi
done
start_of() { # start_of FOLDER BEFORE: the model folder that the stage which makes FOLDER starts from
  if [ "$first_trained" = "$1" ] && [ -n "$init" ]; then echo "$init"; else echo "${2:+$exp/$2}"; fi
}
settings_of() { # settings_of FOLDER: the stage's part of --set, into own_set
  own_set=()
  for setting in "${set[@]}"; do
    [ "$(owner_of "$setting")" != "$1" ] || own_set+=("--set=${setting#"${1#*_}".}")
  done
}
owner_of() { # owner_of KEY=VALUE: the folder of the stage whose name the key begins with; without a name stage 3's
  for folder in "${trained[@]}"; do
    if [[ $1 == "${folder#*_}".* ]]; then echo "$folder" && return; fi
  done
  echo 3_pretrain
}
for setting in "${set[@]}"; do
  owner=$(owner_of "$setting")
  stage_selected "${owner%%_*}" || usage_error "--set $setting" "a stage that is run" "stage ${owner/_/ }" "add stage ${owner%%_*}: a model folder keeps its settings"
done
if [ -n "$first_trained" ]; then
  for part in model train; do
    presets=$(cd "local/conf/$part" && echo *.yaml)
    [ -f "local/conf/$part/$preset.yaml" ] || usage_error "--preset" "a file of local/conf/$part/" "'$preset'" "$(did_you_mean "$preset" ${presets//.yaml/})"
  done
elif [ -n "$init" ] && ! stage_selected 11; then
  usage_error "--init" "a stage that trains or decodes" "stages $stage to $stop_stage" "leave it out"
fi
if [ -n "$init_encoder" ]; then
  [[ $first_trained =~ ^(3_pretrain|4_align)$ ]] || usage_error "--init-encoder" "stage 3 or 4 as the first that trains" "'${first_trained/_/ }'" "--stage 4"
  [ -z "$init" ] || usage_error "--init-encoder" "no --init" "'$init'" "leave one of them out"
  init=$exp/encoder
  [ "$first_trained" = 3_pretrain ] || snapshots=${snapshots:-$init}
fi
model_config=local/conf/model/$preset.yaml train_config=local/conf/train/$preset.yaml
[[ $encoder =~ ^(conformer|zipformer)$ ]] || usage_error "--encoder" "conformer or zipformer" "'$encoder'" "$(did_you_mean "$encoder" conformer zipformer)"
[ "$encoder" = conformer ] || model_config=local/conf/model/${preset}_$encoder.yaml

. utils/setup_env.sh

if stage 0 prepare "$corpus as published -> manifests of its splits, checked"; then
  python local/00_prepare.py --corpus "$corpus" --source "$source" --out "$data/manifests" --download "$download" ${limit:+--limit "$limit"}
fi

if stage 1 fbank "80 log-Mel bins every 10 ms, and their mean and variance"; then
  python local/01_fbank.py --manifests "$data/manifests" --out "$data/fbank" --cmvn-splits "$own_train" \
    --speed-perturb "$speed_perturb" ${jobs:+--jobs "$jobs"} ${executor:+--executor "$executor"}
fi

if stage 2 units "transcripts -> phonemes: what the encoder learns to write"; then
  python local/02_units.py --fbank "$data/fbank" --out "$data/units" --train-splits "$own_train" --language "$language" --ngram "$ngram"
fi

if [ -n "$init_encoder" ]; then python -m nim4 encoder "$init_encoder" --units "$data/units" --out "$init"; fi

training=(--units "$data/units" --train "$train" --valid "$valid" --train-config "$train_config" --device "$device")

if stage 3 pretrain "CR-CTC pre-training of the encoder and its phoneme head"; then
  settings_of 3_pretrain
  start=$(start_of 3_pretrain)
  $launch local/03_pretrain.py "${training[@]}" --noise "$noise" ${start:+--init "$start"} --out "$exp/3_pretrain" --cmvn "$data/fbank/cmvn.json" \
    --model-config "$model_config" "${own_set[@]}"
fi

if stage 4 align "the adaptor learns to speak to the language model"; then
  settings_of 4_align
  start=$(start_of 4_align 3_pretrain)
  $launch local/04_align.py "${training[@]}" --noise "$noise" --init "$start" --out "$exp/4_align" \
    --model-config "$model_config" "${own_set[@]}"
fi

if stage 5 ia_sft "adaptor and LLM, on the encoders that CKA hands on"; then
  settings_of 5_ia_sft
  start=$(start_of 5_ia_sft 4_align)
  $launch local/05_ia_sft.py "${training[@]}" --noise "$noise" --init "$start" --out "$exp/5_ia_sft" \
    --snapshots "${snapshots:-$exp/3_pretrain}" "${own_set[@]}"
fi

if stage 6 joint_sft "everything trains together, on unfinished speech too"; then
  settings_of 6_joint_sft
  start=$(start_of 6_joint_sft 5_ia_sft)
  $launch local/06_joint_sft.py "${training[@]}" --noise "$noise" --init "$start" --out "$exp/6_joint_sft" \
    --language "$language" "${own_set[@]}"
fi

if stage 7 context_sft "names as hints, right ones and wrong ones"; then
  settings_of 7_context_sft
  start=$(start_of 7_context_sft 6_joint_sft) aligner=$(start_of 6_joint_sft 5_ia_sft) # before stage 6 the phoneme head fits its encoder
  if [ -d "$aligner" ] && [ "$start" = "$exp/6_joint_sft" ]; then made=(--aligner "$aligner"); else made=(); fi
  $launch local/07_context_sft.py "${training[@]}" --noise "$noise" --init "$start" --out "$exp/7_context_sft" \
    --language "$language" ${entities:+--entities "$entities"} "${made[@]}" "${own_set[@]}"
fi

if stage 8 grpo "reinforcement learning on its own transcripts"; then
  settings_of 8_grpo
  start=$(start_of 8_grpo 7_context_sft)
  if [ -f "$start/entities.jsonl" ]; then made=(--entities "$start/entities.jsonl"); else made=(); fi
  $launch local/08_grpo.py "${training[@]}" --init "$start" --out "$exp/8_grpo" \
    "${made[@]}" "${own_set[@]}"
fi

if stage 9 phoneme_head "the phoneme head follows the encoder"; then
  settings_of 9_phoneme_head
  start=$(start_of 9_phoneme_head 8_grpo)
  $launch local/09_phoneme_head.py "${training[@]}" --noise "$noise" --init "$start" --out "$exp/9_phoneme_head" "${own_set[@]}"
fi

if stage 10 hotwords "names -> an index of how they sound"; then
  if [ -n "$hotword_list" ]; then
    python local/10_hotwords.py --list "$hotword_list" --units "$data/units" --out "$exp/10_hotwords" ${jobs:+--jobs "$jobs"}
  else
    _stage_say "stage 10 hotwords: no --hotword-list, so no index"
  fi
fi

if stage 11 decode "$decode on $test"; then
  model=$exp/9_phoneme_head
  if [ -z "$first_trained" ] && [ -n "$init" ]; then
    model=$init
  else # the last that has been trained
    for folder in "${trained[@]}"; do [ ! -f "$exp/$folder/done.json" ] || model=$exp/$folder; done
  fi
  if [ -f "$exp/10_hotwords/done.json" ]; then made=(--hotword-index "$exp/10_hotwords"); else made=(); fi
  python local/11_decode.py --model "$model" --units "$data/units" --test "$test" --configs "$decode" \
    --closed "$closed" --lexicon "$lexicon" --hotwords "$hotwords" ${arpa:+--arpa "$arpa"} "${made[@]}" --out "$exp/11_decode" --device "$device"
fi

if stage 12 score "error rates with intervals, speed and latency"; then
  python local/12_score.py --decode "$exp/11_decode" --out "$exp/12_score" --metric "$metric" --profile "$profile"
fi

if stage 13 report "a page that compares the systems clip by clip"; then
  python local/13_report.py --decode "$exp/11_decode" --score "$exp/12_score" --units "$data/units" --profiles "$profile fair" --out "$exp/13_report"
fi

end_stages
if stage_selected 12; then python utils/compare.py "$exp"; fi
