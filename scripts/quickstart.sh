#!/usr/bin/env bash
# Installs jaxpipe into .venv and trains a small GPT as a pipeline over 4 simulated CPU devices: a few minutes on 2 cores.
# Arguments are passed on as overrides: bash scripts/quickstart.sh train.overwrite=true
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh viz
exec .venv/bin/python -m jaxpipe train configs/quickstart.toml "$@"
