# Sourced by run.sh and test.sh: make .venv and install the requirements once; fast when nothing changed.
set -euo pipefail
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/.installed
sum=$(cksum < requirements.txt)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$sum" ]; then
  echo "installing the requirements into .venv (once)" >&2
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: .venv has $(.venv/bin/python --version), and 3.11 or newer with pip is needed: remove .venv, and name" \
      "another one by PYTHON=python3.12" >&2
    exit 1
  }
  # -qq leaves errors alone: pip warns of every place that it finds no packages in
  .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt
  echo "$sum" > "$stamp"
fi
# puts the repository on the path of .venv, so that scripts/ finds its packages; relative, so that the folder may move
for site in .venv/lib/python*/site-packages; do
  [ -f "$site/repository.pth" ] || echo ../../../.. > "$site/repository.pth"
done
