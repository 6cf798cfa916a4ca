"""Which gradient estimator is worth its cost on this model and data? Measure a grid of them on a few batches.

    python scripts/explore.py model=mdeq_tiny data=digits                          # weights as a run begins with them
    python scripts/explore.py run=<folder> checkpoint=best data.batch_size=16      # weights of a run
    python scripts/explore.py run=<folder> grad=upg,npg k=1,3,5,9 lam=0.5,best cosine=0.95
    python scripts/explore.py run=<folder> grad=implicit adjoint_solver=anderson adjoint_solver.max_steps=5,10,22
    python scripts/explore.py run=<folder> grad=implicit adjoint_solver=fixed_point adjoint_solver.tol=0.3,0.1

    run=<folder>          of the model; without it, model= and data= as for train.py
    checkpoint=best       of the run (default: last)
    trust=<package,...>   of yours; the run's config may build what they define
    grad=<leaf,...>       estimators; with k=, lam= and keys of adjoint_solver they are a grid, and lam=best is the
                          damping that the measured spectrum asks for
    cosine=0.9            the cosine that is wanted of the cheapest one
    batches=2             training batches
    title=<text>          of the page
    out=<file.json>       keep the numbers, and beside them their page as .md and their figure as .png

All other items change the run's config, as for evaluate.py, or compose one, as for train.py. What is compared, and with
which reference, is in scripts/bench/explore.py.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from models.official.load import load_reference
    from phantom.engine.artifacts import identity, provenance, records
    from phantom.engine.errors import UserError
    from phantom.engine.machine import streams
    from phantom.engine.rebuild import begin_run, rebuild_run
    from scripts import arguments
    from scripts.bench import explore, result
    from scripts.reporting import explore as page
    from scripts.reporting import pages
    from train import CONFIGS
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")

OWN = ("run", "checkpoint", "trust", "cosine", "batches", "title", "out")


def main(items: Sequence[str]) -> None:
    """Measure, print the page, and write it where `out` says."""
    streams.prepare()
    own, _, others = arguments.split(items, doc=__doc__, own=OWN)
    out = arguments.output(own)
    wanted = arguments.fraction(own, "cosine", 0.9)
    batches = arguments.count(own, "batches", 2)
    grid, overrides = explore.split(others)
    try:
        if "run" in own:
            which = own.get("checkpoint", "last")
            folder, trust = Path(own["run"]), own.get("trust")
            run = rebuild_run(folder, which=which, overrides=overrides, configs=CONFIGS, trust=trust)
        elif alone := [key for key in ("checkpoint", "trust") if key in own]:
            arguments.fail(f"{alone[0]}= is that of a run: name it with run=<folder>")
        else:
            run = begin_run(overrides, CONFIGS, load_reference)
        measured = explore.measure(run, grid, batches)
    except UserError as error:
        arguments.fail(str(error))
    shown = [f"{key}={own[key]}" for key in ("checkpoint", "cosine", "batches") if key in own]
    # <folder> stays without quotes: it is to be filled in
    begin = "python scripts/explore.py" + " run=<folder>" * ("run" in own)
    line = " ".join([begin, *map(shlex.quote, [*shown, *identity.meaningful(others)])])
    title = own.get("title", "Gradient estimators and solvers on a model")
    about = {"title": title, "command": line, "wanted": wanted, **run.about, **provenance.environment(run.device)}
    found = json.loads(records.to_json(about | measured))  # what is not finite is null, as in the file
    print(page.render(found))
    if out is not None:
        result.write(found, out)
        pages.write_explored(out)


if __name__ == "__main__":
    main(sys.argv[1:])
