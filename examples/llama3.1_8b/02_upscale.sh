#!/usr/bin/env bash
# Llama-3.1-8B: base -> up-scaled checkpoint that computes the same function.
# Settings: megatron_midus/recipes/llama3.1_8b.yaml, and the environment (examples/launch/common.sh). --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
recipe llama3.1_8b upscale "$@"
