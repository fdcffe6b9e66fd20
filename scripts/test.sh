#!/usr/bin/env bash
# All checks, as CI runs them: lint, format, types, tests. Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/basedpyright --pythonpath .venv/bin/python
exec .venv/bin/python -m pytest "$@"
