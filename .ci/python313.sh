#!/usr/bin/env bash
# What is tested with the newest of everything, which Python 3.11 cannot have (it ends at jax 0.10.2). Run by `.ci/run`.
#
# The first case of each test in every package: a new JAX breaks a claim in all its cases or in none. Left out are the
# tests marked `slow` and, of the compile tests for H100s, all cases but the first of each too; the other Python has
# run them all. Environments are made anew, for what is newest changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -rf .venv .venv-gpu-aot
bash scripts/setup.sh dev
.venv/bin/python .ci/versions.py
bash scripts/test.sh -m "first_case and not slow and not gpu_aot"
VENV=.venv-gpu-aot bash scripts/setup.sh dev,gpu-aot
.venv-gpu-aot/bin/python .ci/versions.py
exec .venv-gpu-aot/bin/python -m pytest -m "first_case and gpu_aot"
