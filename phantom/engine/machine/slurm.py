"""Tasks of SLURM's srun as the ranks of one run: their variables in the words of torch.distributed."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from phantom.engine.errors import ConfigError

# a name, or the first one of a list such as node[03-07,12]-ib,login
FIRST = re.compile(r"([^\[\],]+)(?:\[(\d+)[^\]]*\]([^\[\],]*))?")


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make this process a rank where srun has started several tasks and no other launcher has spoken.

    Without it, each task would be a run of its own, in one folder. `WORLD_SIZE=1` keeps them apart on purpose: tasks
    that are runs of their own, with folders of their own. torchrun under srun sets WORLD_SIZE itself.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, and MASTER_ADDR and MASTER_PORT where they are missing: the
    first node of the step, and a port that follows from the numbers of job and step.

    Source: "Output environment variables" of srun's manual.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environment or tasks == "1":
        return
    number = 31 * int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", "0"))
    environment["MASTER_ADDR"] = environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"])
    environment["MASTER_PORT"] = environment.get("MASTER_PORT") or str(20000 + number % 10000)
    # a task that was given a GPU of its own sees that one alone
    alone = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
    environment["LOCAL_RANK"] = "0" if alone else environment["SLURM_LOCALID"]
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], tasks


def first_node(nodes: str) -> str:
    """Return the first one of a list of nodes as SLURM abbreviates it.

    Raises:
        ConfigError: there is none.
    """
    found = FIRST.match(nodes)
    if found is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} names no node: set MASTER_ADDR to that of the first task")
    return "".join(part or "" for part in found.groups())
