"""Train an implicit model: the single entry point, for one process or many.

python train.py                                                        # MDEQ-Tiny on handwritten digits
python train.py model=mdeq_small data=imagenet grad=upg k=5 lam=0.6
python train.py -m grad=upg,npg k=1,3,5,9 lam=0.5,0.8,1.0              # a sweep
python train.py experiment=table1/upg_k5_lam0.5 scale=smoke            # a row of the paper, at a small budget
torchrun --nproc-per-node 8 train.py experiment=table3/imagenet_upg    # many GPUs
"""

from __future__ import annotations

import gc
from typing import Any

if __name__ == "__main__":
    gc.disable()  # while libraries load: what they make stays, and looking through it again and again takes a second

from phantom.engine import build, command
from phantom.engine.machine import distributed
from phantom.engine.run import run


def job(config: dict[str, Any], overrides: list[str], choices: dict[str, Any]) -> dict[str, Any]:
    """Run one training job of the command line and return its record."""
    trainer, facts = build.build_trainer(
        config, label=build.label_of(config, choices), overrides=overrides, choices=choices
    )
    gc.enable()
    return run(trainer, facts, resume=config["resume"] == "auto")


if __name__ == "__main__":
    command.run_hydra(job)
    distributed.stop()
