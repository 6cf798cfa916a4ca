"""Compare solvers and gradient estimators on a trained model: what each costs, and how near it comes.

    python scripts/quality.py run=<run folder> images=16 out=results/quality/mdeq_tiny.json
    python scripts/quality.py run=<run folder> checkpoint=best solver.max_steps=60 data.root=/data/cifar10

    run=<folder>          of the model
    checkpoint=last|best  (default: last)
    images=16             of the first training batch
    title=<text>          of the page
    out=<file.json>       keep the numbers, and their page beside them as .md

Other items of the form key=value change the run's config, as for evaluate.py. What is compared, and with which
reference, is in scripts/bench/quality.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from phantom.engine.artifacts import records
    from phantom.engine.errors import UserError
    from phantom.engine.rebuild import rebuild_run
    from scripts import arguments
    from scripts.bench import quality, result
    from scripts.reporting import pages
    from scripts.reporting import quality as page
    from train import CONFIGS
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")


def main(items: Sequence[str]) -> None:
    """Measure, print the page, and write it where `out` says."""
    own, _, overrides = arguments.split(items, doc=__doc__, own=("run", "checkpoint", "images", "title", "out"))
    if "run" not in own:
        arguments.fail("name a run folder with run=<folder>")
    if not own.get("out", ".json").endswith(".json"):
        arguments.fail(f"out={own['out']} must end in .json; its page is written beside it")
    which = arguments.choice(own, "checkpoint", ("last", "best"), "last")
    images = arguments.count(own, "images", 16)
    try:
        run = rebuild_run(Path(own["run"]), which=which, overrides=overrides, configs=CONFIGS)
    except UserError as error:
        arguments.fail(str(error))
    shown = [f"{key}={own[key]}" for key in ("checkpoint", "images") if key in own]
    line = " ".join(["python scripts/quality.py run=<run folder>", *shown, *records.meaningful(overrides)])
    title = own.get("title", "Solvers and gradient estimators on a trained model")
    about = {"title": title, "command": line, **run.about, **records.environment(run.device)}
    found = about | quality.measure(run, images)
    print(page.render(found))
    if "out" in own:
        result.write(found, Path(own["out"]))
        pages.write_quality(Path(own["out"]))


if __name__ == "__main__":
    main(sys.argv[1:])
