#!/usr/bin/env bash
# Installs the lowest versions of libraries that pyproject.toml allows, and runs the laws with them; then,
# for each other Python that is here and supported, with the newest ones.
# About 8 GB in a temporary directory while it runs. LAWS names other tests.
set -euo pipefail
cd "$(dirname "$0")/.."
lowest=${LOWEST_PYTHON:-python3.11}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/uv"
"$scratch/uv/bin/pip" install --quiet uv
export UV_CACHE_DIR=$scratch/cache UV_SYSTEM_CERTS=1 UV_PYTHON_DOWNLOADS=never
uv=$scratch/uv/bin/uv

install() { # PYTHON RESOLUTION WHAT...
  "$uv" venv --quiet --clear --python "$1" "$scratch/venv"
  "$uv" pip install --quiet --python "$scratch/venv/bin/python" --resolution "$2" "${@:3}"
}
named="torch|transformers|accelerate|tokenizers|safetensors|bitsandbytes|gguf|numpy|pyarrow|pyyaml|regex|rich|cyclopts"
versions() { "$uv" pip list --quiet --python "$scratch/venv/bin/python" | grep -iE "^($named) " | tr -s ' ' | paste -sd, -; }
laws() { # WHICH, of the environment that `install` has made
  "$uv" pip install --quiet --python "$scratch/venv/bin/python" pytest pytest-xdist pytest-cov hypothesis peft
  echo "$1: $(versions)"
  PYTHONPATH=src "$scratch/venv/bin/python" -m pytest -n "${JOBS:-2}" -p no:cacheprovider ${LAWS:-tests/laws}
}

install "$lowest" lowest-direct ".[serve]"
laws "$lowest, the lowest versions"

for python in python3.11 python3.12 python3.13 python3.14; do
  [ "$python" != "$lowest" ] || continue
  if ! "$python" -c "" 2>/dev/null; then # a shim may be there without it
    echo "$python is not on this machine; .github/workflows/ci.yml has it"
    continue
  fi
  install "$python" highest ".[serve]"
  laws "$python, the newest versions"
done
