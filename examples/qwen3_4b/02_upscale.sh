#!/usr/bin/env bash
# Qwen3-4B-Base: base -> up-scaled checkpoint that computes the same function.
# Settings: megatron_midus/recipes/qwen3_4b.yaml, and the environment (examples/launch/common.sh). --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
recipe qwen3_4b upscale "$@"
