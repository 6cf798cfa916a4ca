"""A mistake on the command line is answered before any work, by a message with the key, the value and the way out."""

import pytest
from PIL import Image

from phantom.engine.build import build_trainer
from phantom.engine.errors import ConfigError
from tests.plans import plan

ON_DIGITS = ["model=mdeq_tiny", "data=digits"]
UNUSED = "it belongs to grad="

BEFORE_DATA = [
    # keys
    ("sead=1", r"unknown key sead; did you mean seed\? Valid keys here: .*solver"),
    ("+sead=1", r"unknown key sead; did you mean seed\?"),
    ("solver.max_step=5", r"unknown key solver\.max_step; did you mean solver\.max_steps\? Valid keys of solver: "),
    ("+solver.max_step=5", r"phantom\.Broyden has no key max_step; valid keys: max_steps, tol"),
    ("optimizer.foo=1", r"unknown key optimizer\.foo\. Valid keys of optimizer: lr, momentum"),
    ("+optimizer.foo=1", r"optimizer: torch\.optim\.SGD has no key foo; valid keys: .*lr, momentum"),
    ("clipping.max_norm=1", r"clipping is null: choose one first, clipping=each\|total"),
    ("eval_solver.max_steps=3", r"eval_solver=anderson\|broyden\|fixed_point\|rollout"),
    # form
    ("k", "write overrides as key=value"),
    ("k=[1", "write overrides as key=value"),
    ("=5", "write overrides as key=value"),
    ("~seed", "seed=null"),
    ("grad=upg,npg", "add -m"),
    # leaves of groups
    ("model=mdeq_tny", r"model=mdeq_tny is not known; did you mean mdeq_tiny\? Choose one of .*ignn.*mdeq_small"),
    ("grad=ugp", r"grad=ugp is not known; did you mean upg\? Choose one of bptt, implicit, npg"),
    ("solver=null", r"solver=null is not known\. Choose one of anderson, broyden, fixed_point, rollout$"),
    ("clipping=none", r"clipping=none is not known\. Choose one of each, total, null$"),
    ("experiment=table1/upg_k5", r"did you mean table1/upg_k5_lam0\.5\? Choose one of table1/implicit, "),
    ("experiment=table9/upg", r"Choose one of chains, .*language, ppi_synthetic, .*speedrun, table1, .*table4, null$"),
    ("scale=papr", r"did you mean paper\? Choose one of cpu, gpu, paper, smoke$"),
    ("solver._target_=phantom.engine.Nothing", r"solver: .*phantom\.engine\.Nothing"),
    ("model._target_=torch.nn.Linear", "declares no `kinds`"),
    ("solver._target_=phantom.NPG", "solver: phantom.NPG has no key max_steps"),
    # the gradient
    ("k=0", "k=0 must be an integer >= 1"),
    ("k=1.5", r"k=1\.5 must be an integer >= 1"),
    ("k=null", "k=None must be an integer >= 1"),
    ("lam=1.5", r"lam=1\.5 must be in \(0, 1\]"),
    ("lam=0", r"lam=0 must be in \(0, 1\]"),
    ("lam=x", r"lam='x' must be in \(0, 1\]"),
    ("model=ignn data=cox2 subset=32", "subset is not used: the chosen data take no subset; leave it out"),
    ("smoke_steps=3", "smoke_steps is not used at scale=paper: add scale=smoke, or use steps"),
    ("grad=implicit k=9", rf"k is not used by the chosen gradient estimator: {UNUSED}npg\|upg; leave k out"),
    ("grad=one_step lam=0.5", rf"lam is not used .* {UNUSED}npg\|upg"),
    ("grad=upg adjoint_solver.max_steps=5", rf"adjoint_solver is not used .* {UNUSED}implicit; leave"),
    ("grad=npg adjoint_solver=anderson", rf"adjoint_solver is not used .* {UNUSED}implicit"),
    ("grad=shine solver=anderson", "needs solver=broyden"),
    # the pair
    ("model=ignn data=cifar10", r"\(model=mdeq_large\|mdeq_small\|mdeq_tiny\) or .* \(data=chains\|cox2\|.*ppi\|"),
    ("model=mdeq_tiny data=pydocs", r"\(model=deq_transformer\|deq_transformer_small\) or .*digits\|imagenet.*\)"),
    # solvers, optimisers and rules
    ("solver.max_steps=0", r"solver\.max_steps=0 must be an integer >= 1"),
    ("eval_solver=broyden eval_solver.max_steps=0", r"eval_solver\.max_steps=0 must be an integer >= 1"),
    ("solver.max_steps=-1", "max_steps=-1 must be an integer"),
    ("solver.tol=-1", r"tol=-1 must be a number >= 0, or None \(null in YAML\)"),
    ("solver.stop=abs", "stop='abs' is not known; choose one of relative, absolute"),
    ("optimizer.lr=-1", r"optimizer\.lr=-1 must be a number >= 0"),
    ("optimizer.lr=fast", r"optimizer\.lr='fast' must be a number >= 0"),
    ("optimizer.momentum=2", r"optimizer\.momentum=2 must be in \[0, 1\)"),
    ("optimizer.weight_decay=-1", r"optimizer\.weight_decay=-1 must be a number >= 0"),
    ("optimizer=adam optimizer.betas=[2,1]", "optimizer: Invalid beta parameter"),
    ("clipping=total clipping.max_norm=0", "clipping: max_norm=0 must be a number > 0"),
    ("pretraining=unrolled pretraining.steps=0", r"steps=0 must be an integer >= 1"),
    ("penalty=jacobian penalty.frequency=2", r"frequency=2 must be in \(0, 1\]"),
    ("monitor=radius monitor.every=0", "every=0 must be an integer >= 1"),
    ("penalty=jacobian penalty.increment_every=0", "increment_every=0 must be an integer >= 1"),
    ("penalty=jacobian penalty.weight=x", "weight='x' must be a number >= 0"),
    ("schedule.floor=-1", "floor=-1 must be a number >= 0"),
    ("schedule.floor=low", "floor='low' must be a number >= 0"),
    ("schedule.warmup_steps=-1", "warmup_steps=-1 must be an integer >= 0"),
    ("schedule=epoch_steps schedule.epochs=3", r"epochs=3 must be a list of epochs, such as \[50\]"),
    # root keys
    ("seed=1.5", r"seed=1\.5 must be an integer >= 0"),
    ("seed=one", "seed='one' must be an integer >= 0"),
    ("epochs=0", "epochs=0 must be an integer >= 1"),
    ("steps=0", "steps=0 must be an integer >= 1 or null"),
    ("accumulate=0", "accumulate=0 must be an integer >= 1"),
    ("keep_checkpoints=0", "keep_checkpoints=0 must be an integer >= 1"),
    ("log_every=true", "log_every=True must be an integer >= 1"),
    ("compile=maybe", "compile='maybe' must be true or false, or null to let speed= decide"),
    ("speed=fast", "speed='fast' is not known; choose one of auto, off, kernels, padded"),
    ("precision=fp8", "precision='fp8' is not known; choose one of auto, fp32, tf32, bf16"),
    ("gradient_precision=fp16", "choose one of null, bf16"),
    ("on_failure=loud", "choose one of useless, ignore, warn, raise"),
    ("device=tpu", "device='tpu' is not known; choose one of auto, cpu, cuda"),
    ("progress=maybe", "progress='maybe' must be true or false"),
    ("deterministic=2", "deterministic=2 must be true or false"),
    ("resume=yes", "choose one of auto, never"),
    ("wandb=of", "wandb='of' is not known; choose one of auto, online, offline, disabled"),
    ("ema=1.5", r"ema=1\.5 must be in \(0, 1\), or null"),
    ("ema=x", r"ema='x' must be in \(0, 1\), or null"),
    ("target=high", "target='high' must be a finite number, or null to train to the end of the budget"),
    ("target=true", "target=True must be a finite number"),
    ("runs=null", "runs=None must be a name"),
    ("init=''", "init='' must be a path or null"),
    ("init=a continue_from=b", "init and continue_from exclude each other"),
    ("wandb_project=l\u00e4ufe", "in two pairs of quotes"),
    ("eval_splits=test", r"eval_splits='test' must be a list .* such as \[test\]"),
    ("eval_splits=[]", r"eval_splits=\[\] must be a list"),
    ("cuda_graph=true accumulate=2 jitter=below", "it needs jitter=null, accumulate=1"),
]


@pytest.mark.parametrize(("line", "message"), BEFORE_DATA, ids=[line for line, _ in BEFORE_DATA])
def test_refused_before_data_is_looked_for(line, message):
    with pytest.raises(ConfigError, match=message) as error:
        plan(line.split())
    assert "\n" not in str(error.value)


WHILE_BUILDING = [
    ("eval_splits=[foo]", r"eval_splits=\['foo'\] must name splits of the data, which has train, test"),
    ("eval_splits=[test,valid]", "which has train, test"),
    ("data.validation=5000", "must be in"),
    ("data.augment=mirror", "choose one of none, crop_flip"),
    ("data.batch_size=0", "batch_size=0 must be an integer >= 1"),
    ("model.dropout=1.5", r"dropout=1\.5 must be in \[0, 1\)"),
    ("cuda_graph=true device=cpu", "needs a GPU"),
    ("solver.kernels=true device=cpu", r"solver\.kernels=true needs a GPU|need Triton"),
    ("grad=implicit adjoint_solver.kernels=true device=cpu", r"adjoint_solver\.kernels=true needs a GPU|need Triton"),
    ("compile=true model=ignn data=chains solver=fixed_point", "`cell`"),
]


def start(overrides: list[str], runs) -> None:
    """Build all that a run needs, as train.py does before its first step."""
    items = [*overrides, f"runs={runs}", "wandb=disabled"]
    build_trainer(plan(items))


@pytest.mark.parametrize(("line", "message"), WHILE_BUILDING, ids=[line for line, _ in WHILE_BUILDING])
def test_refused_before_the_first_step(line, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        start(line.split(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device=cuda.*no GPU.*device=cpu"):
        start(["device=cuda"], tmp_path)


@pytest.mark.parametrize(
    ("data", "name"), [("cifar10", "cifar10"), ("imagenet", "imagenet"), ("wikitext103", "wikitext103")]
)
def test_a_missing_root_names_the_folder_and_the_two_ways_to_name_another(data, name, tmp_path):
    model = "deq_transformer_small" if data == "wikitext103" else "mdeq_tiny"
    with pytest.raises(ConfigError) as error:
        start([f"data={data}", f"model={model}", f"data.root={tmp_path / 'nowhere'}"], tmp_path / "runs")
    for part in (
        str(tmp_path / "nowhere"),
        "data.root=<folder>",
        f"PHANTOM_DATA to the parent of a folder called {name}",
    ):
        assert part in str(error.value)


def test_a_wrong_layout_names_what_was_expected_and_what_is_there(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cats").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"must hold one folder for each of airplane, .*; it holds cats"):
        start(["data=cifar10", f"data.root={tmp_path}"], tmp_path / "runs")


def test_a_corrupt_picture_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for split in ("train", "test"):
        for name in classes:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / "0.png")
    broken = tmp_path / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    job = ["data=cifar10", f"data.root={tmp_path}", "data.allow_partial=true"]
    with pytest.raises(ConfigError, match=rf"{broken} is damaged and cannot be decoded"):
        start(job, tmp_path / "runs")
    Image.new("RGB", (32, 32)).save(broken)
    with pytest.raises(ConfigError, match=r"has 10 train images, expected 50000.*allow_partial=true"):
        start(job[:2], tmp_path / "runs")
    start(job, tmp_path / "runs")
