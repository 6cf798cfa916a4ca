"""The folder of configs, which a program hands to the engine: its groups, their leaves, and how they compose."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

# groups that offer every leaf of another one, unless they have a leaf of that name themselves
MOUNTED = {"adjoint_solver": "solver", "eval_solver": "solver"}
# root keys that an estimator may bring along: train.yaml does not have them
ESTIMATOR_KEYS = ("k", "lam")
# groups whose leaves choose leaves of the others and fill their keys, from the weakest to the strongest
LAYERS = ("recipe", "experiment", "scale")


@dataclass(frozen=True)
class Configs:
    """The configs of a program: a folder with `train.yaml` and one folder a group."""

    folder: Path

    def leaves(self, group: str) -> list[str]:
        """Return the names of all configs of a group, those of its subfolders as `folder/name`."""
        own = _leaves(self.folder / group)
        return sorted({*own, *(_leaves(self.folder / MOUNTED[group]) if group in MOUNTED else ())})

    def read(self, group: str, leaf: str) -> dict[str, Any]:
        """Return a leaf as it stands in its file, interpolations unresolved."""
        path = self.folder / group / f"{leaf}.yaml"
        if not path.exists() and group in MOUNTED:
            path = self.folder / MOUNTED[group] / f"{leaf}.yaml"
        return plain(OmegaConf.load(path), resolve=False)

    @cached_property
    def groups(self) -> dict[str, str | None]:
        """The groups of train.yaml with their default leaf."""
        items = [pair for entry in self._root["defaults"] if isinstance(entry, dict) for pair in entry.items()]
        return {group: leaf for group, leaf in items if not group.startswith("override ")}

    @cached_property
    def root_keys(self) -> frozenset[str]:
        """Every key that a resolved config may have: those of train.yaml, its groups and the estimators' own."""
        return frozenset({*self._root, *({*self.groups} - {*LAYERS}), *ESTIMATOR_KEYS} - {"defaults", "hydra"})

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The root keys of train.yaml with their values, and None for every group that may be left out."""
        absent = {group: None for group, leaf in self.groups.items() if leaf is None and group in self.root_keys}
        return absent | {key: value for key, value in self._root.items() if key not in ("defaults", "hydra")}

    @cached_property
    def _root(self) -> dict[str, Any]:
        return plain(OmegaConf.load(self.folder / "train.yaml"), resolve=False)

    def mount(self) -> None:
        """Let Hydra find the leaves of a group in the groups that it is mounted as, through its store in memory."""
        store = ConfigStore.instance()
        for group, source in MOUNTED.items():
            for leaf in set(_leaves(self.folder / source)) - set(_leaves(self.folder / group)):
                store.store(group=group, name=leaf, node=self.read(source, leaf), provider="phantom")

    def compose(self, items: Sequence[str]) -> DictConfig:
        """Return what Hydra composes from `items`, in Hydra's own words, with its node `hydra` that holds the choices.

        Raises:
            HydraException, OmegaConfBaseException: see `phantom.engine.config.compose`, which explains them.
        """
        self.mount()
        if GlobalHydra.instance().is_initialized():  # in a job that hydra.main started, on this very folder
            return hydra.compose("train", overrides=list(items), return_hydra_config=True)
        with hydra.initialize_config_dir(str(self.folder), version_base="1.3"):
            return hydra.compose("train", overrides=list(items), return_hydra_config=True)


def _leaves(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def plain(node: Any, *, resolve: bool) -> dict[str, Any]:
    """Return a mapping of OmegaConf as a dictionary of plain values, its interpolations resolved or as they stand."""
    values = OmegaConf.to_container(node, resolve=resolve, throw_on_missing=resolve)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def nearest(name: str, valid: Sequence[str], prefix: str = "") -> str:
    """Return `; did you mean x?` for the nearest valid name, or a full stop where none is near."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else "."
