"""At scale=smoke every row keeps its model and method; data that are not at hand are generated, and named."""

import pytest

from phantom.engine.artifacts import identity
from phantom.engine.errors import ConfigError
from scripts.running import rehearsal
from tests.plans import plan

# a row of every pair of model and data, with what most rows lack
ROWS = ["fig2/implicit", "table1/implicit", "table3/cifar10_implicit", "table3/imagenet_implicit"]
ROWS += ["table3/wikitext103_preln_implicit", *(f"table4/{data}_implicit" for data in ("cox2", "proteins", "ppi"))]
# what a rehearsal may change: the budget, the data, and the memory of a transformer, which is as long as its segment
BUDGET = {"scale", "epochs", "steps", "repeats", "subset", "test_subset", "data"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PHANTOM_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("there", [False, True], ids=["generated", "real"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_stays_the_row(name, there, home):
    row = plan([f"experiment={name}"])
    pair = (row.choices["model"], row.choices["data"])
    if there:
        (home / rehearsal.REHEARSALS[pair].folder).mkdir()
    cut = plan([f"experiment={name}", "scale=smoke", *rehearsal.items(*pair, [])])
    changed = set(identity.differences(row.config, cut.config)) - BUDGET
    assert changed <= ({"model"} if pair[0] == "deq_transformer" else set())
    memory = ("mem_len", "eval_mem_len")
    models = [{key: value for key, value in made.config["model"].items() if key not in memory} for made in (row, cut)]
    assert models[0] == models[1] and cut.task.kind == row.task.kind
    assert ("synthetic" in cut.choices["data"]) is not there
    assert cut.budget.steps is not None and cut.budget.steps <= 20


def test_a_folder_that_is_named_counts(tmp_path):
    (tmp_path / "mine").mkdir()
    items = rehearsal.items("mdeq_tiny", "cifar10", [f"data.root={tmp_path / 'mine'}"])
    assert "data=images_synthetic" not in items
    assert "data=images_synthetic" in rehearsal.items("mdeq_tiny", "cifar10", [])
    assert rehearsal.items("ignn", "chains", []) == []
    assert "data=images_synthetic" not in rehearsal.items("mdeq_small", "imagenet", ["data.root=hf:ILSVRC/imagenet-1k"])
    with pytest.raises(ConfigError, match=r"data\.root=/nowhere is no folder"):
        rehearsal.items("mdeq_tiny", "cifar10", ["data.root=/nowhere"])
