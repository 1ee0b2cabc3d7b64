#!/usr/bin/env bash
# MLS English: 44,660 h of read English audiobooks, 16 kHz, 15.75 h of dev and 15.55 h of test. Licence: CC-BY-4.0. https://www.openslr.org/94
# Get it: one archive of all splits at the address, 2.4 TB as FLAC, 651 GB as Opus, so it is not fetched for you. MLS_ENGLISH=DIR, which holds
#   mls_english or mls_english_opus. To train: MLS_ENGLISH_SPLITS="train dev test" and much memory.
# Scoring: WER. Opus is lossy: say which release a number is from.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus mls_english --source "${MLS_ENGLISH:-data/download/mls_english}" \
  --language en --metric wer --train "" --valid "" --test "dev test" --stop-stage 2 --preset base "$@"
