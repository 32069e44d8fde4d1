#!/bin/sh
# Build the source archive and the wheel, install the wheel into an empty environment, and try it
# there: `sh scripts/try_wheel.sh`. The versions are those of constraints.txt.
# WHEEL_ENV=DIR keeps the environment; PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
env=${WHEEL_ENV:-$work/env}
[ -x "$env/bin/pip" ] || "$PYTHON" -m venv "$env"
"$env/bin/pip" install --quiet -c constraints.txt build setuptools wheel
"$env/bin/python" -m build --no-isolation --outdir "$work/dist" . >"$work/build.log" 2>&1 ||
    { tail -20 "$work/build.log" >&2; exit 1; }
ls "$work/dist"
"$env/bin/pip" install --quiet -c constraints.txt "$work"/dist/*.whl
# Away from the repository, so that the installed package is the one that is tried.
cd "$work"
"$env/bin/flowvi" new-model wheel
"$env/bin/flowvi" fit wheel.py --steps 5 --draws 200 --no-escalate --quiet --out results ||
    [ $? = 3 ] # a verdict of so few steps is no failure
test -s results/report.html
"$env/bin/python" -c "
import flowvi, pathlib
assert not pathlib.Path(flowvi.__file__).is_relative_to('$root'), flowvi.__file__
print(flowvi.__version__, 'is installed and fits')"
