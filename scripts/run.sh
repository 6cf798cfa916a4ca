#!/usr/bin/env bash
# Set up (once) and train: bash scripts/run.sh [overrides]. Without overrides: MDEQ-Tiny with UPG on handwritten digits.
source "$(dirname "$0")/setup.sh"
exec .venv/bin/python train.py "$@"
