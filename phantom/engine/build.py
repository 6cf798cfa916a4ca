"""From a config to a run: the only file that meets models and data at once.

Everything is checked before anything expensive is built: root keys, the fit of data and model, every constructor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch._functorch import config as functorch_config

from phantom import DEQ, SHINE, Broyden
from phantom.engine.artifacts import records
from phantom.engine.artifacts.tracking import Tracker
from phantom.engine.config import values
from phantom.engine.config.compatibility import check_pair, model_config
from phantom.engine.config.instantiate import instantiate, locate, unknown_keys
from phantom.engine.errors import ConfigError
from phantom.engine.machine import distributed, precision
from phantom.engine.source import Shard, Source, Spec
from phantom.engine.tasks.base import Task
from phantom.engine.training.loop import Budget, Trainer
from phantom.engine.training.rules import Rules

TASKS = {
    "image_classification": "phantom.engine.tasks.images.ImageClassification",
    "language_modelling": "phantom.engine.tasks.language.LanguageModelling",
    "graph_classification": "phantom.engine.tasks.graphs.GraphClassification",
    "node_labelling": "phantom.engine.tasks.graphs.NodeLabelling",
    "node_classification": "phantom.engine.tasks.graphs.NodeClassification",
}


def build_deq(config: dict[str, Any]) -> DEQ:
    """Return the DEQ layer of the config: solver, estimator and evaluation solver.

    Raises:
        ConfigError: a solver that does not step, or an estimator that cannot use what the solver leaves.
    """
    solver = instantiate(config["solver"], "solver")
    grad = instantiate(config["grad"], "grad")
    eval_solver = instantiate(config["eval_solver"], "eval_solver")
    dtype = torch.bfloat16 if config["gradient_precision"] == "bf16" else None
    try:
        deq = DEQ(solver=solver, grad=grad, eval_solver=eval_solver, graph_dtype=dtype)
    except TypeError as error:
        raise ConfigError(str(error)) from error
    for name, found in (("solver", solver), ("eval_solver", eval_solver)):
        if found is not None and found.max_steps < 1:
            raise ConfigError(
                f"{name}.max_steps={found.max_steps} must be an integer >= 1; grad=bptt trains without a solve"
            )
    if isinstance(grad, SHINE) and not isinstance(solver, Broyden):
        raise ConfigError("grad=shine reuses the steps of the forward solve: it needs solver=broyden")
    return deq


def build_optimizer(config: dict[str, Any], parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser of `parameters`.

    Raises:
        ConfigError: an unknown key, or a value the optimiser refuses.
    """
    settings = config["optimizer"]
    values.check_rates(settings)
    make = instantiate(settings, "optimizer")
    try:
        return make(parameters)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {unknown_keys(settings, {}, error) or error}") from error


def build_model(config: dict[str, Any], spec: Spec, deq: DEQ) -> nn.Module:
    """Return the model for data of this spec; the numbers of the spec are handed to it."""
    return instantiate(model_config(config, spec.kind), "model", **spec.inputs, deq=deq)


def compile_cell(model: nn.Module) -> None:
    """Compile f: the module `cell`, whose `forward` takes all that varies as arguments, becomes one graph.

    Raises:
        ConfigError: the model has no such module.
    """
    cell = getattr(model, "cell", None)
    if not isinstance(cell, nn.Module):
        raise ConfigError(f"compile=true needs a model whose f is one module, `cell`; {type(model).__name__} has none")
    # adjoint estimators and diagnostics run the backward of one evaluation of f several times
    functorch_config.donated_buffer = False
    # a graph per shape, with and without grad: streams of text have a growing memory and a short end, in every split
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    cell.compile(fullgraph=True, dynamic=False)


def build_task(kind: str) -> Task:
    """Return the task that scores data of this kind."""
    return locate(TASKS[kind])()


def build_source(config: dict[str, Any]) -> Source:
    """Return the source of data, located and checked."""
    return instantiate(config["data"], "data")


def start(config: dict[str, Any]) -> tuple[torch.device, int, int]:
    """Return (this process's device, rank, world size).

    Raises:
        ConfigError: the device is not there.
    """
    try:
        return distributed.start(config["device"])
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_rules(config: dict[str, Any], deq: DEQ) -> Rules:
    """Return what depends on the step."""
    return Rules(
        solver=deq.solver,
        grad=deq.grad,
        seed=config["seed"],
        pretraining=instantiate(config["pretraining"], "pretraining"),
        penalty=instantiate(config["penalty"], "penalty"),
        jitter=instantiate(config["jitter"], "jitter"),
    )


def build_budget(config: dict[str, Any], splits: Sequence[str]) -> Budget:
    """Return the budget, with the evaluation splits checked against those the data has."""
    wanted = tuple(config["eval_splits"])
    missing = [split for split in wanted if split not in splits]
    if missing or not wanted:
        raise ConfigError(f"eval_splits={list(wanted)} must name splits of the data, which has {', '.join(splits)}")
    return Budget(
        epochs=config["epochs"],
        steps=config["steps"],
        eval_every=config["eval_every"],
        log_every=config["log_every"],
        checkpoint_every=config["checkpoint_every"],
        eval_splits=wanted,
    )


def label_of(config: dict[str, Any], choices: dict[str, Any]) -> str:
    """Return the experiment's name, or model-data-gradient; with the scale unless it is the paper's."""
    label = choices.get("experiment") or "-".join(str(choices[group]) for group in ("model", "data", "grad"))
    return label if config["scale"] == "paper" else f"{label}@{config['scale']}"


def build_trainer(
    config: dict[str, Any], *, label: str, overrides: Sequence[str], choices: dict[str, Any]
) -> tuple[Trainer, dict[str, Any]]:
    """Build everything a run needs; return the trainer and the facts its record begins with.

    Raises:
        ConfigError: an unknown key, an impossible value or pair, or data that cannot be found.
    """
    kind = check_pair(config)
    deq = build_deq(config)
    rules = build_rules(config, deq)
    schedule = instantiate(config["schedule"], "schedule")
    clipping = instantiate(config["clipping"], "clipping")
    monitor = instantiate(config["monitor"], "monitor")
    precision.set_up(config["precision"], deterministic=config["deterministic"])
    device, rank, world = start(config)
    if config["cuda_graph"] and (device.type != "cuda" or world > 1):
        raise ConfigError("cuda_graph=true needs a GPU and one process; leave it out here")
    shard = Shard(rank=rank, world=world, micro=config["accumulate"])
    source = build_source(config)
    source.to(device)
    budget = build_budget(config, source.splits)
    torch.manual_seed(config["seed"])  # the same initial weights on every rank
    bare = build_model(config, source.spec, deq).to(device)
    if config["compile"]:
        compile_cell(bare)
    try:
        model = distributed.wrap(bare, device, world, sync_batchnorm=config["sync_batchnorm"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    torch.manual_seed(config["seed"] + 1000003 * (rank + 1))  # but dropout masks of their own
    folder = records.run_folder(config["runs"], label, overrides, config["seed"]).absolute()
    optimizer = build_optimizer(config, [p for p in bare.parameters() if p.requires_grad])
    trainer = Trainer(
        model=model,
        bare=bare,
        task=build_task(kind),
        source=source,
        optimizer=optimizer,
        schedule=schedule,
        rules=rules,
        budget=budget,
        clipping=clipping,
        monitor=monitor,
        ema_decay=config["ema"],
        shard=shard,
        device=device,
        precision=config["precision"],
        cuda_graph=config["cuda_graph"],
        progress=config["progress"],
        folder=folder,
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        make_tracker=lambda: Tracker(
            mode=config["wandb"],
            project=config["wandb_project"],
            name=f"{label}/{folder.parent.name}",
            folder=folder,
            config=config,
        ),
    )
    groups = bare.parameter_groups_count()
    facts = {
        "label": label,
        "experiment": choices.get("experiment"),
        "choices": choices,
        "overrides": records.meaningful(overrides),
        "scale": config["scale"],
        "seed": config["seed"],
        "config_hash": records.config_hash(config),
        "kind": kind,
        "metric": trainer.task.metric,
        "baseline": source.spec.baseline,
        "data_digests": source.spec.digests,
        "num_parameters": sum(p.numel() for p in bare.parameters()),
        "parameter_groups": groups,
        # where the original counts otherwise, such as a shared weight twice
        "official_parameter_count": getattr(bare, "official_parameter_count", None),
        "world_size": world,
        **{key: config[key] for key in ("precision", "gradient_precision", "compile", "cuda_graph")},
        "folder": str(folder.relative_to(Path(config["runs"]).absolute())),
    }
    return trainer, facts
