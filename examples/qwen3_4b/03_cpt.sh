#!/usr/bin/env bash
# Qwen3-4B-Base: continual pre-training of the Memory blocks, base frozen, on one node or many.
# Settings: megatron_midus/recipes/qwen3_4b.yaml, and the environment (examples/launch/common.sh). --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
recipe qwen3_4b pretrain "$@"
