#!/usr/bin/env bash
# SpeechIO: 26 Mandarin test sets, 64.5 h of news, talks, films, games and more, 16 kHz (ZH00001 to ZH00026; ZH00000 is 1 h more). Licence: for evaluation, keys on request. https://github.com/SpeechColab/Leaderboard
# Get it: ask for a key at the address, and pull each set. SPEECHIO=DIR, which holds SPEECHIO_ASR_ZH00001 and so on; --test names those you have.
# Scoring: CER. The leaderboard gives the mean of 26 rates; the paper does not say whether its number is that or the pooled rate.
sets=$(printf 'test_zh%05d ' {1..26})
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus speechio --source "${SPEECHIO:-data/download/speechio}" \
  --language zh --metric cer --train "" --valid "" --test "${sets% }" --stop-stage 2 --preset base "$@"
