#!/usr/bin/env bash
# Set up (once) and test: bash scripts/test.sh [pytest arguments]. Long tests: bash scripts/test.sh -m slow
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# a process for every core, with one thread each; the tests of a file share what they train, and stay together
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -q -n auto --dist loadfile "$@"
