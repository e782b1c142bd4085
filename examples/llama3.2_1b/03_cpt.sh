#!/usr/bin/env bash
# Llama-3.2-1B: continual pre-training of the Memory blocks, base frozen, on one node or many.
# Settings: megatron_midus/recipes/llama3.2_1b.yaml, and the environment (examples/launch/common.sh). --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
recipe llama3.2_1b pretrain "$@"
