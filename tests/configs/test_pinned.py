"""Every leaf has the numbers of its source: a changed leaf changes runs that name it, and nobody else would notice."""

from typing import Any

import pytest

from tests.configs.pinned import PINNED
from tests.plans import composed
from train import CONFIGS

FILE = "tests/configs/pinned.py"
# where files lie, and how fast a thing runs
ELSEWHERE = {"root", "download", "cache", "allow_partial", "workers", "channels_last", "compile", "_partial_"}
# groups whose leaves the command line completes: read from the resolved config
COMPLETED = {
    "grad": ((), ("grad",)),
    "solver": ((), ("solver",)),
    "eval_solver": ((), ("eval_solver",)),
    "adjoint_solver": (("grad=implicit",), ("grad", "solver")),
}
# experiments and recipes have tests of their own, test_paper.py and test_recipes.py
GROUPS = [group for group in CONFIGS.groups if group not in ("experiment", "recipe")]
# a rollout measures no residual, which an adjoint solve needs
REFUSED = ("adjoint_solver", "rollout")
LEAVES = [(group, leaf) for group in GROUPS for leaf in CONFIGS.leaves(group) if (group, leaf) != REFUSED]


def numbers(node: Any) -> Any:
    """Return a leaf with the name of its class for its path, without what is of no science or follows the run."""
    if not isinstance(node, dict):
        return node
    result = {}
    for key, value in node.items():
        if key == "_target_":
            result["class"] = value.rsplit(".", 1)[-1]
        elif key not in ELSEWHERE and not (isinstance(value, str) and value.startswith("${")):
            result[key] = numbers(value)
    return result


def read(group: str, leaf: str) -> dict[str, Any]:
    """Return the leaf as a run gets it that names nothing else."""
    if group not in COMPLETED:
        return CONFIGS.read(group, leaf)
    more, path = COMPLETED[group]
    node, _ = composed([f"{group}={leaf}", *more])
    for key in path:
        node = node[key]
    return {key: value for key, value in node.items() if (group, key) != ("grad", "solver")}


@pytest.mark.parametrize(("group", "leaf"), LEAVES, ids=lambda part: part)
def test_a_leaf_has_the_numbers_of_its_source(group, leaf):
    pinned = PINNED.get(group, {})
    assert leaf in pinned, f"configs/{group}/{leaf}.yaml is new: write its numbers into PINNED[{group!r}] of {FILE}"
    found = numbers(read(group, leaf))
    assert found == pinned[leaf], f"configs/{group}/{leaf}.yaml and PINNED[{group!r}][{leaf!r}] of {FILE} differ"


@pytest.mark.parametrize("group", PINNED)
def test_no_number_is_of_a_leaf_that_is_gone(group):
    gone = sorted(set(PINNED[group]) - {leaf for other, leaf in LEAVES if other == group})
    assert not gone, f"PINNED[{group!r}] of {FILE} has leaves that configs/{group} has not: {', '.join(gone)}"
