#!/usr/bin/env bash
# An environment for `longllava web`, and for modeling_tests/test_web.py, which drives the page in Debian's Chromium:
#
#   scripts/web_environment.sh ENVIRONMENT
#
# constraints.txt does not hold here: Gradio 6 needs Pillow 12 and huggingface-hub 1 or 2.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 ENVIRONMENT" >&2; exit 2; }
environment=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Two versions of a package, one here and one elsewhere, are an error of pip's.
unset PIP_CONSTRAINT

python3 -m venv "$environment"
# PyTorch first: what comes after it would pull gigabytes of CUDA.
"$environment/bin/pip" install -q "torch==2.13.0"
"$environment/bin/pip" install -q "torch==2.13.0" "selenium>=4.30" "pytest>=8" -e ".[web]"

for program in chromium chromedriver; do
  command -v "$program" > /dev/null || echo "The test needs $program: apt-get install chromium chromium-driver" >&2
done
