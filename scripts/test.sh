#!/bin/sh
# Sets up everything, then lint, format, types and tests; options of pytest may follow.
# With -m '' the tests that take longest run too.
set -eu
cd "$(dirname "$0")/.."
extra=test
. scripts/setup.sh

ruff check .
ruff format --check .
mypy
# Small arrays are fastest on one thread; the tests share the processors instead.
OMP_NUM_THREADS=1 MPLBACKEND=agg python -m pytest -n 2 -m "not slow" "$@"
