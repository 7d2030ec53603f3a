#!/usr/bin/env bash
# An environment that has Transformers and nothing of this package, nor what this package could use beside it:
#
#   scripts/hub_environment.sh ENVIRONMENT CONSTRAINTS
#   LONGLLAVA_HUB_PYTHON=$PWD/ENVIRONMENT/bin/python python -m pytest modeling_tests/test_hub.py
#
# In it that test loads an exported checkpoint, whose code is all there is.
set -euo pipefail

[ $# -eq 2 ] || { echo "usage: $0 ENVIRONMENT CONSTRAINTS" >&2; exit 2; }
python3 -m venv "$1"
# PyTorch first: what comes after it would pull gigabytes of CUDA.
"$1/bin/pip" install -q -c "$2" torch
"$1/bin/pip" install -q -c "$2" transformers pillow
