#!/usr/bin/env bash
# Tests of exported models in a real vLLM, on the CPU: tests/serving/run.sh [pytest arguments]
# Makes (once) an environment of its own: vLLM pins other versions than the rest of the tests.
#
# MIDUS_VLLM_VENV    where it lies (default: .venv-vllm in the repository)
# MIDUS_TEST_WORKERS processes that share the tests (default: 2, for 2 cores)
# MIDUS_VLLM_PYTHON  interpreter to make it with (default: python3.11)
# torch 2.13.0+cpu has to be found: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL may say where.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv="${MIDUS_VLLM_VENV:-$PWD/.venv-vllm}"
python="${MIDUS_VLLM_PYTHON:-python3.11}"
stamp="$venv/.midus-$(cksum < tests/serving/requirements.txt | tr ' ' '-')"
if [ ! -e "$stamp" ]; then
    echo "Installing vLLM into $venv (once, one to ten minutes; log: $venv.log)"
    rm -rf "$venv"
    {
        if command -v uv > /dev/null; then
            uv venv --python "$python" "$venv"
            # Byte code: where imports may not write it, every start would compile torch again.
            uv pip install ${PYTHONDONTWRITEBYTECODE:+--compile-bytecode} --python "$venv/bin/python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} -r tests/serving/requirements.txt
            # They do not fit the CPU build of torch, and vLLM does without: torchvision::nms does not exist.
            uv pip uninstall --python "$venv/bin/python" torchvision torchaudio torchcodec
        else
            "$python" -m venv "$venv"
            "$venv/bin/pip" install -r tests/serving/requirements.txt
            "$venv/bin/pip" uninstall -y torchvision torchaudio torchcodec
        fi
    } > "$venv.log" 2>&1 || {
        tail -n 15 "$venv.log" >&2
        echo "error: vLLM could not be installed; see $venv.log" >&2
        exit 1
    }
    touch "$stamp"
fi

# The package as users have it beside vLLM: installed, without its dependencies of training; found when it is on the path.
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
cp -r setup.py README.md pyproject.toml pretrain_midus.py megatron_midus "$place"
"$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$venv/bin/python" -m ensurepip > /dev/null
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --target "$place/installed" "$place" > "$place/log" 2>&1 || {
    cat "$place/log" >&2
    exit 1
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=""
export MIDUS_INSTALLED="$place/installed" PYTHONPATH="$PWD"
"$venv/bin/python" -m pytest -q -n "${MIDUS_TEST_WORKERS:-2}" --dist loadgroup --durations=10 -p no:cacheprovider "${@:-tests/serving}"
