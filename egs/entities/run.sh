#!/usr/bin/env bash
# Entities: your own recordings of sentences with names of places, media and devices, of as many hours as you record. Licence: yours. https://arxiv.org/abs/2604.18105
# Get it: write DIR/names.tsv (name, weight, tag: poi, media, device), run egs/entities/make_script.py DIR, and record the lines of DIR/script.tsv
#   as DIR/recordings/<speaker>/<id>.wav. ENTITIES=DIR egs/entities/run.sh; then the same with --stage 10 --stop-stage 12 --init MODEL.
# Scoring: MER, and utils/entity_recall.py exp/entities/base/11_decode --names DIR/names.tsv: how many names that were said are written.
#   They stand for the paper's internal tables (POI, media, device control), whose recordings are not public: no number compares with those.
source=${ENTITIES:-data/download/entities}
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus entities --source "$source" --hotword-list "$source/names.tsv" \
  --language zh-en --metric mer --train "" --valid "" --test "test_poi test_media test_device" \
  --decode "offline offline_hotwords streaming streaming_hotwords" --stop-stage 2 --preset base "$@"
