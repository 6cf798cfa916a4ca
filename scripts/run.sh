#!/usr/bin/env bash
# Set up (once) and train: bash scripts/run.sh [overrides]. Without overrides: MDEQ-Tiny with UPG on handwritten digits.
here=$PWD
source "$(dirname "$0")/setup.sh"
root=$PWD
cd -- "$here" # relative paths among the overrides are those of who typed them
exec "$root/.venv/bin/python" "$root/train.py" "$@"
