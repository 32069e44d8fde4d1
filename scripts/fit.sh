#!/bin/sh
# Sets up everything and fits eight schools; options of `flowvi fit` may follow.
set -eu
cd "$(dirname "$0")/.."
extra=data
. scripts/setup.sh

flowvi fit models/eight_schools.py --out results/eight_schools "$@"
