#!/usr/bin/env bash
# Cross-compiles the native parts for arm64 and runs them in an emulator: every call that the tests of the
# kernels make here is made there again, and has to write the same numbers (tools/replay_kernels.cpp).
# Debian's g++-aarch64-linux-gnu and qemu-user are installed where they are missing and you are root.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null; then
  [ "$(id -u)" = 0 ] || { echo "Install g++-aarch64-linux-gnu and qemu-user first, or be root." >&2; exit 2; }
  echo "Installing g++-aarch64-linux-gnu and qemu-user ..."
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
    g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user; } >/dev/null
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
HATCH_BUILD_HOOKS_ENABLE=true CXX=aarch64-linux-gnu-g++ \
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch" .
"$python" -m zipfile -e "$scratch"/*.whl "$scratch/wheel"
libraries=$scratch/wheel/veneer/kernels/prebuilt
file=$scratch/calls.bin
# One thread: sums are the same for any number of them, and the tests say so elsewhere. Not those of
# arenas, whose memory is used again once nobody has it: what is recorded is kept.
VENEER_RECORD=$file PYTHONPATH=src:tests OMP_NUM_THREADS=1 "$python" -m pytest -n 0 -p no:cacheprovider \
  -p support.recorded_kernels --ignore tests/kernels/test_arena.py ${KERNEL_TESTS:-tests/kernels tests/quant}
# The libraries take OpenMP from whoever loads them, here from the program.
aarch64-linux-gnu-g++ -std=c++20 -O2 -Wall -Wextra -fopenmp tools/replay_kernels.cpp \
  -o "$scratch/replay" -Wl,--no-as-needed -lgomp -ldl
qemu-aarch64 -L /usr/aarch64-linux-gnu "$scratch/replay" "$file" "$libraries" neon
