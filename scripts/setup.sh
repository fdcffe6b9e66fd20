#!/usr/bin/env bash
# Makes .venv and installs jaxpipe into it with extras: bash scripts/setup.sh viz|dev|dev,gpu-aot
# Needs Python 3.11 or newer (set PYTHON to name one) and uses uv if there is one. Does nothing where it already did all.
# VENV names another folder than .venv. What was installed into it before stays and is brought along.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

asked=${1:?usage: bash scripts/setup.sh EXTRA[,EXTRA…]}
venv=${VENV:-.venv}
stamp="$venv/.installed"  # the extras, then for which pyproject.toml and place
there=$([[ ! -f $stamp ]] || head -n 1 "$stamp")
extras=$(tr ',' '\n' <<<"$there,$asked" | grep . | sort -u | paste -sd,)
wanted="$extras
$(cksum pyproject.toml) $PWD"

fail() {
    echo "setup: $*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

can_make_venvs() {
    command -v uv >/dev/null || "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

find_python() {
    local name old="" bare=""
    if [[ -n ${PYTHON:-} ]]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.11 or newer"
        can_make_venvs "$PYTHON" || fail "PYTHON=$PYTHON lacks the modules venv and ensurepip (Debian: apt install python3-venv)"
        echo "$PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python; do
        if ! is_new_enough "$name"; then
            command -v "$name" >/dev/null && old="$name"
        elif ! can_make_venvs "$name"; then
            bare="$name"
        else
            echo "$name"
            return
        fi
    done
    [[ -z $bare ]] || fail "$bare lacks the modules venv and ensurepip (Debian: apt install python3-venv); or set PYTHON"
    [[ -z $old ]] || fail "found only $old, but Python 3.11 or newer is needed; install one or set PYTHON to its path"
    fail "no Python found; install Python 3.11 or newer or set PYTHON to its path"
}

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c 'import jaxpipe' 2>/dev/null; then
    exit 0
fi

if [[ -d $venv ]]; then
    is_new_enough "$venv/bin/python" || fail "$venv holds no working Python 3.11 or newer; delete $venv and run this again"
else
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version)"
    if command -v uv >/dev/null; then
        uv venv --quiet --python "$python" "$venv"
    else
        "$python" -m venv "$venv"
    fi
fi

echo "setup: installing jaxpipe[$extras] into $venv (once; some minutes on a new machine)"
if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" --editable ".[$extras]"
else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
fi
echo "$wanted" >"$stamp"
