#!/usr/bin/env bash
# Set up (once) and test: bash scripts/test.sh [pytest arguments]. Long tests: bash scripts/test.sh -m slow
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -q "$@"
