# shellcheck shell=bash
# What `.ci/run` and `.ci/canary` share: a clone, a virtual environment, and the README's commands in it.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Two versions of a package, one here and one in a lane's constraints, are an error of pip's.
unset PIP_CONSTRAINT

clone() { # LANE: a clone of what is committed, and go there
  git clone -q "$root" "$work/$1"
  cd "$work/$1"
}

readme_command() { # NAME CONSTRAINTS: the block that is marked `<!-- command: NAME -->`, with other constraints
  local lines
  lines=$(awk -v name="$1" '$0 == "<!-- command: " name " -->" {found=1; next} found && /^```bash/ {inside=1; next} inside && /^```/ {exit} inside' README.md)
  [ -n "$lines" ] || { echo "The README has no command marked $1." >&2; return 1; }
  echo "${lines//constraints.txt/$2}"
}

run_and_test() { # CONSTRAINTS [PACKAGE...]: the README's two commands, the tests that tell most of a new release first
  local run tests answer
  run=$(readme_command run "$1")
  tests=$(readme_command tests "$1")
  echo "-- $run"
  bash -euo pipefail -c "$(sed '$d' <<<"$run")"
  .venv/bin/pip install -q -c "$1" pytest hypothesis "${@:2}"
  .venv/bin/python -m pytest -q modeling_tests/test_contract.py modeling_tests/test_private_names.py
  answer=$(bash -euo pipefail -c "$(tail -n 1 <<<"$run")" | tee >(cat >&2) | tail -n 1)
  [ "$answer" = 5 ] || { echo "The film shows a 5, but the answer was '$answer'."; return 1; }
  echo "-- $tests"
  bash -euo pipefail -c "$tests"
}
