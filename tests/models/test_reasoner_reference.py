"""The recursive reasoner against arrays recorded from the official TRM modules, in float64.

The folder of the arrays is named by PHANTOM_REFERENCE; without it these tests are skipped.
"""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from models.official.load import _without_prefix, load_reference
from models.official.reasoner import rename_reasoner
from models.reasoner import Reasoner
from models.reasoner.cell import TwoSpeeds
from models.reasoner.layers import AttentionBlock, MixerBlock, Stack
from models.reasoner.model import compare
from models.reasoner.supervision import Supervision
from phantom import BPTT, DEQ, NPG, UPG, Rollout

FOLDER = Path(os.environ.get("PHANTOM_REFERENCE") or ".")
NAMES = ("reasoner_trm", "reasoner_trm_mixer")
pytestmark = pytest.mark.skipif(
    not ("PHANTOM_REFERENCE" in os.environ and all((FOLDER / f"{name}.npz").is_file() for name in NAMES)),
    reason="PHANTOM_REFERENCE does not name a folder with reasoner_trm.npz and reasoner_trm_mixer.npz",
)


class Recorded:
    """The arrays of one file, and the model they were recorded from."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.config = json.loads(str(self.arrays["config_json"]))
        self.cycles = self.config["H_cycles"]

    def __getitem__(self, key: str) -> torch.Tensor:
        value = torch.tensor(self.arrays[key])
        return value.double() if value.is_floating_point() else value

    def section(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}

    def model(self, grad, *, differentiate: str = "cycle") -> Reasoner:
        config = self.config
        if config["mlp_t"]:
            block = partial(MixerBlock, expansion=config["expansion"], multiple=256)
        else:
            block = partial(AttentionBlock, num_heads=config["num_heads"], expansion=config["expansion"], multiple=256)
        stack = partial(Stack, num_layers=config["L_layers"], block=block)
        model = Reasoner(
            d_model=config["hidden_size"],
            prefix_tokens=config["puzzle_emb_len"],
            positions=config["pos_encodings"],
            start="fixed",
            noise=0.0,
            differentiate=differentiate,
            cell=partial(TwoSpeeds, stack=stack, num_fast=config["L_cycles"], shared=True, lam=1.0),
            supervision=Supervision(steps=config["halt_max_steps"], halting="halt"),
            vocab_size=config["vocab_size"],
            height=4,
            width=4,
            deq=DEQ(solver=Rollout(max_steps=self.cycles - 1), grad=grad, eval_solver=Rollout(max_steps=self.cycles)),
        ).double()
        state = self.section("sd/")
        state["inner.puzzle_emb.weights"] = state["inner.puzzle_emb.weights"][:1]
        load_reference(model, state, "trm")
        return model

    def prefix(self) -> torch.Tensor:
        rows = self["sd/inner.puzzle_emb.weights"]
        return rows[self["puzzle_identifiers"].long()].requires_grad_()

    def start(self, model: Reasoner):
        return model.start_state(self["inputs"].long())

    def after(self, step: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self[f"{step}/z_H"], self[f"{step}/z_L"]


@pytest.fixture(scope="module", params=NAMES)
def recorded(request):
    return Recorded(request.param)


@pytest.fixture(scope="module")
def attention():
    return Recorded("reasoner_trm")


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def losses(model: Reasoner, recorded: Recorded, step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the summed loss of the cells, of the halting output, and which answers are right."""
    labels = recorded["labels"].long()
    exact = compare(step.logits, labels)[0]
    halting = model.supervision.halting_losses(step.halting, exact, None)
    return model.supervision.cell_losses(step.logits, labels).sum(), halting.sum(), exact


@torch.no_grad()
def test_embedding_block_and_stack(recorded):
    model = recorded.model(UPG(k=1, lam=1.0))
    assert relative(model.embed(recorded["inputs"].long(), recorded.prefix()), recorded["embeddings"]) < 1e-12
    rotary = None if model.cosines is None else (model.cosines, model.sines)
    state, injection = recorded["cell/state"], recorded["cell/injection"]
    assert relative(model.cell.fast(state, injection, rotary), recorded["cell/L_out"]) < 1e-12
    first = model.cell.fast.blocks[0](state + injection, rotary)
    assert relative(first, recorded["cell/L_block0_out"]) < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_two_supervision_steps(recorded, training):
    model = recorded.model(UPG(k=1, lam=1.0)).train(training)
    state = recorded.start(model)
    with torch.set_grad_enabled(training):
        for name in ("step1", "step2"):
            step = model.step(recorded["inputs"].long(), state, prefix=recorded.prefix())
            state = step.state
            for value, expected in zip(state, recorded.after(name), strict=True):
                assert relative(value, expected) < 1e-9
            assert relative(step.logits, recorded[f"{name}/logits"]) < 1e-9
            q = torch.stack([recorded[f"{name}/q_halt_logits"], recorded[f"{name}/q_continue_logits"]], dim=1)
            assert relative(step.halting, q) < 1e-9
            cells, halting, exact = losses(model, recorded, step)
            assert (cells + halting).item() == pytest.approx(recorded[f"{name}/loss"].item(), rel=1e-9)
            if name == "step1":
                assert cells.item() == pytest.approx(recorded["step1/lm_loss"].item(), rel=1e-9)
                assert halting.item() == pytest.approx(recorded["step1/q_halt_loss"].item() / 2, rel=1e-9)
                assert exact.sum() == recorded["step1/exact_accuracy"]
                assert torch.equal(step.logits.argmax(dim=2), recorded["step1/preds"].long())


@torch.no_grad()
def test_the_state_before_the_last_cycle(recorded):
    model = recorded.model(UPG(k=1, lam=1.0)).train()
    x = model.embed(recorded["inputs"].long(), recorded.prefix())
    before = model.deq(model.bind(x), recorded.start(model))
    for value, expected in zip(before.value, recorded.after("last_cycle_start"), strict=True):
        assert relative(value, expected) < 1e-9
    assert before.stats.num_evals == recorded.cycles - 1


RULES = {
    "grad_official": [(UPG(k=1, lam=1.0), "cycle"), (NPG(k=1, lam=1.0), "cycle")],
    "grad_bptt": [(BPTT(num_steps=3), "cycle"), (BPTT(num_steps=3), "pair")],
    "grad_onestep": [(NPG(k=1, lam=1.0), "pair"), (UPG(k=1, lam=1.0), "pair")],
}


def check_gradients(recorded: Recorded, rule: str, grad, differentiate: str) -> None:
    model = recorded.model(grad, differentiate=differentiate).train()
    prefix = recorded.prefix()
    step = model.step(recorded["inputs"].long(), recorded.start(model), prefix=prefix)
    cells, halting, _ = losses(model, recorded, step)
    (cells + halting).backward()
    assert (cells + halting).item() == pytest.approx(recorded["step1/loss"].item(), rel=1e-9)
    expected = recorded.section(f"{rule}/")
    assert relative(prefix.grad, expected.pop("puzzle_emb")) < 1e-9
    found = {name: p.grad for name, p in model.named_parameters() if name != "prefix"}
    expected = {rename_reasoner(name, shared=True)[0]: value for name, value in expected.items()}
    assert found.keys() == expected.keys()
    assert {name: error for name in found if (error := relative(found[name], expected[name])) > 1e-9} == {}


@pytest.mark.parametrize(("grad", "differentiate"), RULES["grad_official"])
def test_the_official_gradient(recorded, grad, differentiate):
    check_gradients(recorded, "grad_official", grad, differentiate)


@pytest.mark.parametrize("rule", ["grad_bptt", "grad_onestep"])
@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_through_everything_and_that_of_the_last_pair(attention, rule, which):
    check_gradients(attention, rule, *RULES[rule][which])


def test_the_gradient_of_the_second_supervision_step(recorded):
    model = recorded.model(UPG(k=1, lam=1.0)).train()
    prefix = recorded.prefix()
    step = model.step(recorded["inputs"].long(), recorded.after("step1"), prefix=prefix)
    cells, halting, _ = losses(model, recorded, step)
    (cells + halting).backward()
    expected = recorded.section("step2/grad_official/")
    assert relative(prefix.grad, expected["puzzle_emb"]) < 1e-9
    (name,) = expected.keys() - {"puzzle_emb"}
    assert relative(model.embedding.weight.grad, expected[name]) < 1e-9


def test_halting_of_the_first_step(recorded):
    model = recorded.model(UPG(k=1, lam=1.0)).train()
    q = torch.stack([recorded["step1/q_halt_logits"], recorded["step1/q_continue_logits"]], dim=1)
    quiet = Supervision(steps=16, halting="halt", exploration=0.0)
    assert quiet.finished(q, torch.ones(3, dtype=torch.long)).tolist() == (q[:, 0] > 0).tolist()
    assert model.supervision.finished(q, torch.full((3,), 16)).all()
    assert recorded["step1/halted"].bool().tolist() == (q[:, 0] > 0).tolist()


@pytest.mark.parametrize("prefix", ["", "inner.", "model.inner.", "_orig_mod.model.inner.", "module._orig_mod.inner."])
def test_names_as_the_codes_save_them(prefix):
    names = {f"{prefix}{name}": torch.zeros(1) for name in ("lm_head.weight", "H_init", "L_init")}
    assert [rename_reasoner(name, shared=True) for name in _without_prefix(names)] == [
        rename_reasoner(name, shared=True) for name in ("lm_head.weight", "H_init", "L_init")
    ]
    assert rename_reasoner("lm_head.weight", shared=True) == ("readout.weight",)
