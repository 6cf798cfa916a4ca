#!/usr/bin/env bash
# Set up (once) and build the site into docs/_build/html: bash scripts/docs.sh [sphinx-build options]
source "$(dirname "$0")/setup.sh"
stamp=.venv/.installed_docs
sum=$(cksum < pyproject.toml)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$sum" ]; then
  echo "installing what the site needs into .venv (once)" >&2
  .venv/bin/python -m pip install -qq --disable-pip-version-check -e ".[docs]"
  echo "$sum" > "$stamp"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m sphinx -b html -c docs -W --keep-going -q "$@" . docs/_build/html
