# What `.ci/run` and `.ci/canary` share: a clone, a virtual environment, and the README's commands in it.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

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

run_and_test() { # CONSTRAINTS: the README's two commands, the tests that tell most of a new release first
  local run tests install answer
  run=$(readme_command run "$1")
  tests=$(readme_command tests "$1")
  echo "-- $run"
  answer=$(bash -euo pipefail -c "$run" | tee >(cat >&2) | tail -n 1)
  [ "$answer" = 5 ] || { echo "The film shows a 5, but the answer was '$answer'."; return 1; }
  echo "-- $tests"
  install=$(grep "pip install" <<<"$tests")
  bash -euo pipefail -c "$install"
  .venv/bin/python -m pytest -q modeling_tests/test_contract.py modeling_tests/test_private_names.py
  bash -euo pipefail -c "$(grep -v "pip install" <<<"$tests")"
}
