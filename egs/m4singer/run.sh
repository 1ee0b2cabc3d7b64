#!/usr/bin/env bash
# M4Singer: 29.8 h of sung Mandarin, lines of songs by 20 singers, 48 kHz. Licence: CC-BY-NC-SA-4.0, on application. https://github.com/M4Singer/M4Singer
# Get it: the form at the address. M4SINGER=DIR, which holds m4singer.
# Scoring: CER. The paper's subset is unknown, so its number cannot be compared with one of all lines, as here.
exec "$(dirname "${BASH_SOURCE[0]}")/../../run.sh" --corpus m4singer --source "${M4SINGER:-data/download/m4singer}" \
  --language zh --metric cer --train "" --valid "" --test "test" --stop-stage 2 --preset base "$@"
