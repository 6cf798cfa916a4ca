"""Train an implicit model: the single entry point, for one process or many.

python train.py                                                        # MDEQ-Tiny on handwritten digits
python train.py model=mdeq_small data=imagenet grad=upg k=5 lam=0.6
python train.py -m grad=upg,npg k=1,3,5,9 lam=0.5,0.8,1.0              # a sweep
python train.py experiment=table1/upg_k5_lam0.5 scale=smoke            # a row of the paper, at a small budget
torchrun --nproc-per-node 8 train.py experiment=table3/imagenet_upg    # many GPUs
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # imports create many long-lived objects; scanning them repeatedly costs about a second

from models.official.load import load_reference
from phantom.engine import command
from phantom.engine.build import build_trainer
from phantom.engine.config.configs import Configs
from phantom.engine.machine import distributed
from phantom.engine.plan import Plan
from phantom.engine.run import run

CONFIGS = Configs(Path(__file__).resolve().parent / "configs")


def job(plan: Plan) -> dict[str, Any]:
    """Train as the plan says and return the record."""
    trainer = build_trainer(plan, load_reference)
    gc.enable()
    return run(trainer, plan)


if __name__ == "__main__":
    command.run(job, CONFIGS)
    distributed.stop()
