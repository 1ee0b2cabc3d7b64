#!/usr/bin/env bash
# Makes an environment with a Triton server that runs without a container, for tests and benchmarks/gateway_cost.py: about 500 MB.
#   utils/triton_env.sh DIR
#   export NIM4_TRITON_ENV=DIR
# The server is 2.51.0, on the CPU, with the Python backend only. Tests also need a client where they run:
#   python -m pip install --no-deps tritonclient==2.73.0 python-rapidjson==1.25
# Its own pins would take back protobuf; it runs with the newer one.
set -euo pipefail

dir=${1:?usage: utils/triton_env.sh DIR}
python=${PYTHON:-python3}
"$python" -m venv "$dir"
"$dir/bin/python" -m pip install --quiet nvidia-pytriton==0.7.0 onnxruntime==1.32.0
"$dir/bin/python" -m pip install --quiet --no-deps numpy==2.4.6 # what the graph's runtime is used with elsewhere; pytriton's own code, which is not used, wants an older one
printf 'export NIM4_TRITON_ENV=%s\n' "$(cd "$dir" && pwd)"
