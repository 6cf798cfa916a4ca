"""Spectral radius and gradient quality on a training batch, against dense computation; the run is not disturbed."""

import pytest
import torch
import torch.nn.functional as F

from phantom import BPTT, NPG, UPG, Broyden, FixedPoint, Implicit, JacobianRegularizer
from phantom.engine.measure.monitor import Monitor
from phantom.engine.tasks.images import ImageClassification
from tests.engine import tiny

EXACT = FixedPoint(max_steps=500, tol=1e-13)
TASK = ImageClassification()


def classifier(**changes) -> tiny.Classifier:
    torch.manual_seed(1)
    model = tiny.Classifier(**changes)
    model.deq.solver = EXACT
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    source = tiny.Vectors()
    return source.inputs["train"], source.labels("train")


def measure(model: tiny.Classifier, **changes) -> dict[str, float]:
    return Monitor(**({"every": 1, "radius_steps": 0} | changes)).measure(model, TASK, batch(), None)


@pytest.mark.parametrize("lam", [0.3, 0.8])
def test_the_radius_is_that_of_the_dense_jacobian(lam):
    model = classifier()
    found = measure(model, radius_steps=20, lam=lam)
    plain, damped = [], []
    with torch.no_grad():
        injections = model.encoder(batch()[0])
    for injection in injections:
        f = model.cell.bind(injection)
        z = torch.zeros_like(injection)
        for _ in range(1000):
            z = f(z).detach()
        eigenvalues = torch.linalg.eigvals(torch.autograd.functional.jacobian(f, z))
        plain.append(eigenvalues.abs().max())
        damped.append((lam * eigenvalues + 1 - lam).abs().max())
    assert found == {
        "spectral_radius": pytest.approx(float(torch.stack(plain).mean()), rel=1e-9),
        "damped_spectral_radius": pytest.approx(float(torch.stack(damped).mean()), rel=1e-9),
        "spectral_radius_above_one": 0.0,
        "damped_spectral_radius_above_one": 0.0,
    }


def test_the_share_of_problems_where_f_expands():
    model = classifier()
    model.deq.solver = Broyden(max_steps=300, tol=1e-12)
    with torch.no_grad():
        model.cell.weight.mul_(6)  # tanh saturates at most problems, not at all
        _, (solution,) = model(batch()[0])
        injections = model.encoder(batch()[0])
    found = measure(model, radius_steps=20)
    radii = [
        torch.linalg.eigvals(torch.autograd.functional.jacobian(model.cell.bind(x), z)).abs().max()
        for x, z in zip(injections, solution.z_star, strict=True)
    ]
    share = sum(float(radius) > 1 for radius in radii) / len(radii)
    assert found["spectral_radius_above_one"] == pytest.approx(share) and 0 < share < 1


def test_the_radius_is_that_of_the_weights_that_f_reads():
    """Where a model projects its weights as it uses them, f and its equilibrium belong to the projected ones."""
    model, projected = classifier(), classifier()
    hook = model.register_forward_pre_hook(project)
    project(projected, None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert measure(model, radius_steps=20) == measure(projected, radius_steps=20)
    assert tiny.same(dict(model.state_dict()), before)
    hook.remove()
    assert measure(model, radius_steps=20) != measure(projected, radius_steps=20)


def gradient(model: tiny.Classifier, estimator=None) -> torch.Tensor:
    """Return the gradient before the head; without an estimator, by differentiating a long iteration."""
    x, labels = batch()
    if estimator is None:
        f = model.cell.bind(model.encoder(x))
        z = torch.zeros(len(x), 5, dtype=x.dtype)
        for _ in range(400):
            z = f(z)
        logits = model.head(z)
    else:
        model.deq.grad = estimator
        logits, _ = model(x)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    wanted = [*model.encoder.parameters(), *model.cell.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])


def test_cosine_and_norm_ratio_are_those_of_the_exact_gradient():
    model = classifier()
    exact = gradient(model)
    estimators = {"": UPG(k=1, lam=0.5), "npg": NPG(k=2, lam=0.5), "implicit": Implicit(solver=EXACT)}
    estimates = {name: gradient(classifier(), estimator) for name, estimator in estimators.items()}
    model.deq.grad = estimators.pop("")
    found = measure(model, exact_solver=EXACT, compare=estimators)
    assert found.pop("exact_residual") < 1e-12 and found.pop("exact_unsolved") == found.pop("pretraining") == 0
    assert len(found) == 6
    for name, estimate in estimates.items():
        suffix = f"/{name}" if name else ""
        cosine = float(F.cosine_similarity(estimate, exact, dim=0))
        assert found[f"gradient_cosine{suffix}"] == pytest.approx(cosine, rel=1e-9)
        assert found[f"gradient_norm_ratio{suffix}"] == pytest.approx(float(estimate.norm() / exact.norm()), rel=1e-9)
    assert found["gradient_cosine"] < 0.999 < found["gradient_cosine/implicit"]


class Nested(tiny.Classifier):
    """The state of the classifier as a dict of a tensor and a tuple."""

    def forward(self, x, z0=None):
        f, start = self.cell.bind(self.encoder(x)), torch.zeros(len(x), 5, dtype=x.dtype)

        def parts(z):
            return {"a": z[:, :2], "b": (z[:, 2:],)}

        def whole(state):
            return torch.cat([state["a"], *state["b"]], dim=1)

        solution = self.deq(lambda state: parts(f(whole(state))), parts(start))
        return self.head(whole(solution.value)), (solution,)


def test_a_state_of_several_parts_has_the_numbers_of_the_whole():
    torch.manual_seed(1)
    model = Nested()
    model.deq.solver = EXACT
    found = measure(model, exact_solver=EXACT, radius_steps=20)
    assert found == pytest.approx(measure(classifier(), exact_solver=EXACT, radius_steps=20), rel=1e-9)


def test_all_estimates_see_the_same_dropout_masks():
    model = classifier(dropout=0.5, batch_norm=True)
    model.deq.grad = Implicit(solver=EXACT)
    found = measure(model, exact_solver=EXACT)
    assert found["gradient_cosine"] == pytest.approx(1.0) and found["gradient_norm_ratio"] == pytest.approx(1.0)


def test_a_reference_that_is_not_exact_says_so():
    model = classifier()
    model.deq.grad = BPTT(num_steps=3)
    found = measure(model, exact_solver=FixedPoint(max_steps=1, tol=1e-13))
    f = model.cell.bind(model.encoder(batch()[0]).detach())
    z = torch.zeros(len(batch()[0]), 5, dtype=torch.float64)
    for _ in range(400):
        z = f(z).detach()
    # one step from u = 0 is u = g, which leaves |J^T g| / |g|: recomputed with the Jacobian of every problem
    logits = model.head(z.requires_grad_())
    (g,) = torch.autograd.grad(F.cross_entropy(logits, batch()[1], reduction="sum"), z)
    (left,) = torch.autograd.grad(f(z), z, g)
    residuals = left.norm(dim=1) / g.norm(dim=1)
    assert found["exact_residual"] == pytest.approx(float(residuals.quantile(0.9)), rel=1e-6)
    assert found["exact_unsolved"] == float((residuals > 1e-2).double().mean()) > 0
    assert found["pretraining"] == 1


def test_a_measurement_leaves_the_run_as_it_was():
    model = classifier(dropout=0.5, batch_norm=True).train()
    grad, regularizer = UPG(k=3, lam=0.5), JacobianRegularizer()
    model.deq.grad, model.deq.regularizer, clock = grad, regularizer, model.deq.clock
    TASK.score(model, batch(), None).tally.loss_sum.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    measure(model, radius_steps=3, exact_solver=EXACT, compare={"npg": NPG(k=2, lam=0.5)})
    assert tiny.same(dict(model.state_dict()), before) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert (model.deq.grad, model.deq.regularizer, model.deq.clock) == (grad, regularizer, clock)
    assert model.training


def project(model, arguments):
    """Change a weight where it is used, as a model does that keeps it in a ball."""
    with torch.no_grad():
        model.cell.weight.mul_(0.9)


@pytest.mark.parametrize("projects", [False, True])
def test_a_monitored_run_is_the_same_run(tmp_path, projects):
    monitor = Monitor(every=2, radius_steps=2, exact_solver=EXACT)
    runs = []
    for name, each in (("with", monitor), ("without", None)):
        torch.manual_seed(0)
        model = tiny.Classifier(dropout=0.5, batch_norm=True)
        if projects:
            model.register_forward_pre_hook(project)
        run = tiny.trainer(
            tmp_path / name, unwrapped=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), monitor=each
        )
        run.fit(resume=False)
        runs.append(run)
    assert tiny.same(dict(runs[0].unwrapped.state_dict()), dict(runs[1].unwrapped.state_dict()))
    rows = tiny.rows(tmp_path / "with")
    assert [row["step"] for row in rows if row["kind"] == "monitor"] == [2, 4, 6]
    assert [row for row in rows if row["kind"] != "monitor"] == tiny.rows(tmp_path / "without")


@pytest.mark.parametrize(("field", "value"), [("every", 0), ("radius_steps", -1), ("every", 1.5)])
def test_impossible_values(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        Monitor(**({"every": 1} | {field: value}))
