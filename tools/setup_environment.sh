#!/usr/bin/env bash
# Makes (once) and enters the Python environment of this project: `source tools/setup_environment.sh EXTRA,EXTRA`.
# Scripts give an argument in any case, "" for no extras: without one, bash hands over the script's own.
# The extra "gpu?" is Transformer Engine where nvidia-smi lists a GPU; where it cannot be installed, what that costs is said.
#
# MIDUS_VENV    where it lies (default: .venv in the repository); a path of your own shares it between clones
# MIDUS_PYTHON  interpreter to make it with, 3.10 or newer (default: python3)
# Set MIDUS_VENV=none to use the Python that is on PATH, for example inside the Docker image.

_midus_fail() { printf 'error: %s\n' "$*" >&2; return 1; }

_midus_setup() {
    local root extras venv python stamp
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
    extras="${1:-}"
    if [[ "$extras" == *"gpu?"* ]]; then
        extras="${extras//,gpu?/}"
        if nvidia-smi --list-gpus 2>/dev/null | grep -q .; then extras="$extras,gpu"; fi
    fi
    venv="${MIDUS_VENV:-$root/.venv}"
    python="${MIDUS_PYTHON:-python3}"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    [ "$venv" = none ] && return 0

    command -v "$python" >/dev/null || { _midus_fail "$python was not found; install Python 3.10 or newer"; return 1; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { _midus_fail "$("$python" --version) is too old; set MIDUS_PYTHON to Python 3.10 or newer"; return 1; }
    # Installed once per content of the two files that say what to install, and per set of extras.
    stamp="$venv/.midus-$(cat "$root/setup.py" "$root/constraints.txt" | cksum | tr ' ' '-')-${extras//,/-}"
    if [ ! -e "$stamp" ]; then
        mkdir -p "$(dirname "$venv")" || return 1
        # Shells or nodes that start together: one makes it, the others wait and find it made.
        (
            if command -v flock >/dev/null; then flock 9; fi
            [ -e "$stamp" ] || _midus_make
        ) 9>"$venv.lock" || return 1
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}

# Reads the variables of _midus_setup.
_midus_make() {
    local log="$venv/install.log" gpu="$extras" extras="${extras//,gpu/}"
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -m venv "$venv" ||
            { rm -rf "$venv"; _midus_fail "$python cannot make a virtual environment; on Debian: apt install python3-venv"; return 1; }
    fi
    printf 'Installing the Python environment into %s (once, a few minutes; log: %s)\n' "$venv" "$log"
    {
        # torch first: with it in place nothing later chooses another build of it.
        _midus_install setuptools torch && _midus_install --no-build-isolation -e "$root${extras:+[$extras]}"
    } >"$log" 2>&1 || { tail -n 15 "$log" >&2; _midus_fail "the installation failed; see $log"; return 1; }
    if [[ ",$gpu," == *,gpu,* ]]; then _midus_transformer_engine; fi
    touch "$stamp"
}

# By uv where it is or can be had, which takes a fraction of the time, and by pip where uv cannot.
_midus_install() {
    local uv
    uv="$(command -v uv)" || uv="$venv/bin/uv"
    [ -x "$uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv || true
    if [ -x "$uv" ]; then
        # What pip is told about indexes, which uv does not read. As pip does, take the best version of all of them.
        local options=(--index-strategy unsafe-best-match) option
        while read -r option; do options+=("$option"); done < <("$venv/bin/python" -m pip config list 2>/dev/null |
            sed -nE "s/^.*\.(index-url|extra-index-url|find-links)='(.*)'$/\1 \2/p" |
            while read -r name values; do for value in $values; do printf -- '--%s=%s\n' "$name" "$value"; done; done)
        # uv leaves byte code to the first import, and such imports write none: every start would compile torch again.
        [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || options+=(--compile-bytecode)
        "$uv" pip install --python "$venv/bin/python" "${options[@]}" -c "$root/constraints.txt" "$@" && return 0
        printf 'uv could not, so pip tries\n'
    fi
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" "$@"
}

# Built from source against the torch that is there, so it needs nvcc and some minutes; training works without.
_midus_transformer_engine() {
    printf 'Installing Transformer Engine (once, up to half an hour; log: %s)\n' "$log"
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" --no-build-isolation -e "${root}[gpu]" >>"$log" 2>&1 ||
        printf '%s\n' "WARNING: Transformer Engine could not be installed (see $log)." \
            "WARNING: Training goes on with layers of plain torch: slower, more memory, no context parallelism, no FP8." \
            "WARNING: It needs the CUDA toolkit (nvcc); the image of the Dockerfile has it." >&2
}

_midus_setup "$@"
