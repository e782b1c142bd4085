#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: checks the Triton kernels there and measures them, in under 8 minutes.
#   tests/gpu/run.sh [DIRECTORY]    results (default: gpu-results); needs the package installed in the active environment
# Every part runs, whatever became of the ones before; the exit status is 1 when any failed and 2 when there is no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
results="${1:-gpu-results}"

if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() or torch.version.cuda is None)'; then
    echo "tests/gpu/run.sh: torch finds no NVIDIA GPU here (torch.cuda.is_available() is false or this torch has no CUDA); nothing was checked" >&2
    exit 2
fi
mkdir -p "$results"
failed=()

# part NAME SECONDS COMMAND...: runs it with a limit, keeps its output as NAME.txt
part() {
    local name="$1" limit="$2"
    shift 2
    echo "== $name: $*"
    if ! timeout "$limit" "$@" 2>&1 | tee "$results/$name.txt"; then
        failed+=("$name")
    fi
}

python - > "$results/machine.txt" << 'PYTHON'
import platform, torch, triton
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "python", platform.python_version(),
      "torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
PYTHON
nvidia-smi >> "$results/machine.txt" 2>&1 || true
git rev-parse HEAD >> "$results/machine.txt" 2>/dev/null || true
cat "$results/machine.txt"

# Some tests compare with float64 at full size, in several GB each.
workers=()
if python -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
part tests 200 python -m pytest -q -p no:cacheprovider ${workers[@]+"${workers[@]}"} tests/gpu --durations=10
part benchmark-hml 150 python tools/benchmark.py hml --shape paper-1b --json "$results/benchmark-hml.json"
part benchmark-layer 60 python tools/benchmark.py layer --shape paper-1b --json "$results/benchmark-layer.json"
part model 60 python tools/kernel_model.py --json "$results/model.json"

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (see $results)" >&2
    exit 1
fi
echo "all parts passed; results are in $results"
