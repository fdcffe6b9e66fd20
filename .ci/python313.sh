#!/usr/bin/env bash
# What is tested with the newest of everything, which Python 3.11 cannot have (it ends at jax 0.10.2). Run by `.ci/run`.
#
# The first case of each test in every package and every tenth after it: a new JAX mostly breaks a claim in all its cases
# or in none. Left out are the tests marked `slow`; of the compile tests for H100s too those cases alone. The other Python
# has run them all. Environments are made anew, for what is newest changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -rf .venv .venv-gpu-aot
bash scripts/setup.sh dev
.venv/bin/python .ci/versions.py
bash scripts/test.sh -m "sampled and not slow and not gpu_aot"
VENV=.venv-gpu-aot bash scripts/setup.sh dev,gpu-aot
.venv-gpu-aot/bin/python .ci/versions.py
exec .venv-gpu-aot/bin/python -m pytest -m "sampled and gpu_aot"
