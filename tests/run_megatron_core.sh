#!/usr/bin/env bash
# The checks that depend on the release of Megatron-Core, on Python 3.12 with the newest one: tests/run_megatron_core.sh [pytest arguments]
#
# Makes the environment once, by uv where that is installed, and keeps it outside of the repository, so that clones share it.
# MIDUS_CORE_VENV    where it lies (default: a directory of the user's cache, named by what is installed)
# MIDUS_PYTHON312    interpreter to make it with (default: the first Python 3.12 that is found)
# MIDUS_REQUIRED=1   fail without a Python 3.12, instead of saying that nothing was tested
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"

find_python() {
    local candidate
    for candidate in ${MIDUS_PYTHON312:-} python3.12 "$(uv --version >/dev/null 2>&1 && uv python find --no-python-downloads 3.12 2>/dev/null)" \
        "$HOME"/.pyenv/versions/3.12*/bin/python; do
        # A pyenv shim is there without the version that it stands for.
        "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 && { printf '%s\n' "$candidate"; return; }
    done
    return 1
}

install() { # into the environment of $1, what $2 and onwards say
    local venv="$1"
    shift
    if uv --version >/dev/null 2>&1; then
        # Byte code: where imports may not write it, every start would compile torch again.
        uv pip install --quiet ${PYTHONDONTWRITEBYTECODE:+--compile-bytecode} --python "$venv/bin/python" -c constraints.txt "$@"
    else
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
    fi
}

if ! python="$(find_python)"; then
    printf 'Python 3.12 was not found, so nothing was tested with a newer Megatron-Core than that of tests/run.sh\n' >&2
    exit "${MIDUS_REQUIRED:-0}"
fi
venv="${MIDUS_CORE_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron_midus/core-$(cat setup.py constraints.txt | cksum | cut -d' ' -f1)}"
if [ ! -e "$venv/.complete" ]; then
    printf 'Installing Megatron-Core on Python 3.12 into %s (once; torch with CUDA is some gigabytes)\n' "$venv"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    install "$venv" setuptools torch
    # Of the project only what it needs: the sources are those of this directory.
    "$venv/bin/python" -c '
import setuptools
from distutils.core import run_setup
project = run_setup("setup.py", stop_after="init")
print(*project.install_requires, *(r for e in ("test", "upstream") for r in project.extras_require[e]), sep="\n")
' >"$venv/requirements.txt"
    install "$venv" -r "$venv/requirements.txt"
    touch "$venv/.complete"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=""
python -c 'from importlib.metadata import version; print("Megatron-Core", version("megatron-core"), "and torch", version("torch"))'

if [ $# -eq 0 ]; then
    layouts="tests/distributed/test_layout_matrix.py::test_every_layout_trains_alike"
    set -- tests/functional/test_upstream.py tests/functional/test_megatron_releases.py tests/functional/test_short_journey.py \
        "tests/distributed/test_model_parity.py::test_logits[tp2 sp-token, no attention]" "tests/distributed/test_model_parity.py::test_logits[tp2 sp-concat]" \
        "${layouts}[tp2 sp]" "${layouts}[tp2 sp, full recompute]" "${layouts}[pp2 vpp2, uneven]" "${layouts}[dp2, overlapped]" \
        tests/unit/integrations tests/unit/memory tests/unit/model tests/unit/training tests/unit/conversion tests/unit/test_platform.py
fi
python -m pytest -q -n "${MIDUS_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=8 "$@"
