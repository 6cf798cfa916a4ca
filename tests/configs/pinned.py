"""The numbers of every leaf under configs/, written down a second time, each with its source.

Sources, where a comment names no other: Geng et al. 2021 and its official code for MDEQ; Bai et al. 2021 and its
official code (deq) for the DEQ Transformer and the Jacobian penalty; Gu et al. 2020 and its official code for IGNN.
"Ours" marks a choice that no paper makes. `class` is the constructor's name. Keys that say where files lie or how fast
a thing runs are left out, and so is what follows the run, such as `${seed}`.
"""

from typing import Any

from tests.configs.pinned_reasoners import COURSES, DATA, MODELS, ROLLOUT

MDEQ = {"class": "MDEQ", "expansion": 5, "num_groups": 8, "num_blocks": 1, "dropout": 0.0}
TRANSFORMER = {
    "class": "DEQTransformer",
    **{"div_val": 4, "norm": "post", "preln_residual": "normalised", "window": 1000},
    **{"dropout": 0.05, "attention_dropout": 0.0},
}
TUDATASET = {
    "class": "TUGraphs",
    # the official protocol: the folds of seed 42, batches of 128 in a fixed order, evaluation on 2A + I
    **{"folds": "official", "fold": 0, "split_seed": 42, "batch_size": 128, "shuffle": False, "validation": 0.0},
    **{"eval_adjacency": "doubled", "merge_nodes": True},
}
IN_MEMORY = {"augment": "none", "validation": 0}
ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}


def ignn_layer(kappa: float, name: str = "ImplicitGraphLayer") -> dict[str, Any]:
    return {"class": name, "kappa": kappa, "dead_parameters": True}


PINNED: dict[str, dict[str, dict[str, Any]]] = {
    "model": {
        # Table 1: the paper's TINY
        "mdeq_tiny": {
            **MDEQ,
            **{"channels": [24, 24], "head_channels": [8, 16], "final_channels": 200},
            **{"num_downsamples": 0, "init": "normal"},
        },
        # Table 3, CIFAR-10, "10M"
        "mdeq_large": {
            **MDEQ,
            **{"channels": [32, 64, 128, 256], "head_channels": [14, 28, 56, 112], "final_channels": 1680},
            **{"num_downsamples": 0, "init": "normal"},
        },
        # Table 3, ImageNet, "18M"
        "mdeq_small": {
            **MDEQ,
            **{"channels": [32, 64, 128, 256], "head_channels": [24, 48, 96, 192], "final_channels": 2048},
            **{"num_downsamples": 2, "init": "default"},
        },
        # Table 3, WikiText-103, "98M", PostLN
        "deq_transformer": {
            **TRANSFORMER,
            **{"d_model": 700, "num_heads": 10, "d_inner": 48_000, "cutoffs": [20_000, 40_000, 200_000]},
            **{"mem_len": 150, "eval_mem_len": 150, "init_std": 0.01},
        },
        # ours; init_std is 0.01 sqrt(700 / 128)
        "deq_transformer_small": {
            **TRANSFORMER,
            **{"d_model": 128, "num_heads": 4, "d_inner": 512, "cutoffs": [2000]},
            **{"mem_len": 64, "eval_mem_len": 64, "init_std": 0.0234},
        },
        # Table 4; Chains is of Gu et al. 2020
        "ignn": {
            "graph_classification": {
                **{"class": "GraphIGNN", "hidden": 64, "num_layers": 3, "dropout": 0.5, "layer": ignn_layer(0.9)},
            },
            "node_labelling": {
                **{"class": "NodeIGNN", "widths": [1024, 512, 512, 256], "layer": ignn_layer(0.98)},
            },
            "node_classification": {"class": "ChainsIGNN", "hidden": 16, "dropout": 0.5, "layer": ignn_layer(0.9)},
        },
        # torchdeq, deq-zoo/ignn/nodeclassification
        "ignn_spectral": {
            "node_labelling": {
                "class": "NodeIGNN",
                "widths": [1024, 512, 512, 256],
                "layer": ignn_layer(0.98, "SpectralGraphLayer"),
            },
        },
    },
    "data": {
        # Gu et al. 2020: 2 x 20 chains, of 400 nodes 20 train and 100 validate and 200 test; the official seed
        "chains": {
            **{"class": "Chains", "length": 10, "chains_per_class": 20, "num_classes": 2, "num_features": 100},
            **{"train_nodes": 20, "valid_nodes": 100, "test_nodes": 200, "seed": 42},
        },
        "cifar10": {"class": "CIFAR10", "batch_size": 128, "eval_batch_size": 200, **IN_MEMORY},
        # ours: the size of scale=cpu
        "cifar10_small": {
            **{"class": "CIFAR10Small", "size": 16, "num_train": 4000, "num_test": 2000, "batch_size": 128},
            **{"eval_batch_size": 200, **IN_MEMORY},
        },
        "cox2": {**TUDATASET, "name": "COX2"},
        "cox2_synthetic": {**TUDATASET, "class": "SyntheticTU", "name": "COX2"},
        "digits": {"class": "Digits", "batch_size": 64, "eval_batch_size": 180, **IN_MEMORY},  # ours
        # ours, in CIFAR-10's shape
        "images_synthetic": {
            **{"class": "SyntheticImages", "num_classes": 10, "size": 32, "num_train": 512, "num_test": 128},
            **{"generation_seed": 0, "batch_size": 128, "eval_batch_size": 200, **IN_MEMORY},
        },
        # area and aspect of the official code's pipeline; Table 3's implicit row changes them
        "imagenet": {
            **{"class": "ImageNet", "batch_size": 128, "eval_batch_size": 100, "crop": 224, "resize": 256},
            **{"scale": [0.1, 1.0], "ratio": [0.8, 1.25], "streaming": False, "shuffle_buffer": 1000},
        },
        "ppi": {"class": "PPI", "batch_size": 1, "eval_batch_size": 2},
        # the real set's batches; its graphs are ours
        "ppi_synthetic": {
            **{"class": "SyntheticPPI", "scale": 1.0, "generation_seed": 0, "batch_size": 1, "eval_batch_size": 2},
        },
        "proteins": {**TUDATASET, "name": "PROTEINS"},
        "proteins_synthetic": {**TUDATASET, "class": "SyntheticTU", "name": "PROTEINS"},
        "pydocs": {"class": "PyDocs", "streams": 16, "eval_streams": 4, "segment": 64},  # ours
        # ours, with WikiText-103's vocabulary
        "text_synthetic": {
            **{"class": "SyntheticText", "vocab_size": 267_735, "num_train": 100_000, "num_eval": 10_000},
            **{"generation_seed": 0, "streams": 56, "eval_streams": 16, "segment": 150},
        },
        "wikitext103": {
            **{"class": "WikiText103", "oov": "error", "streams": 56, "eval_streams": 16, "segment": 150},
            "eval_tokens": None,
            "files": {"train": "wiki.train.tokens", "valid": "wiki.valid.tokens", "test": "wiki.test.tokens"},
        },
    },
    "optimizer": {
        "adam": {"class": "Adam", **ADAM, "weight_decay": 0.0},  # the implicit rows; torch's other defaults
        "adamw": {"class": "AdamW", **ADAM, "weight_decay": 0.05},  # ours
        # the phantom rows of Tables 1 and 3, CIFAR-10; decay on all parameters, no Nesterov
        "sgd": {"class": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4},
        "timm": {"class": "create_optimizer_v2", "opt": "lamb", "lr": 1e-3, "weight_decay": 1e-4},  # ours
    },
    "schedule": {
        "constant": {"class": "Constant"},
        "cosine": {"class": "Cosine", "floor": 1e-6, "warmup_steps": 0, "of_steps": None},  # Tables 1 and 3, vision
        "epoch_steps": {"class": "EpochSteps", "epochs": [50], "factor": 0.5},  # Table 4, COX2 and PROTEINS
    },
    "clipping": {
        "each": {"class": "ClipEach", "max_norm": 0.5},  # Chains
        "total": {"class": "ClipTotal", "max_norm": 1.0},  # ours; Table 3's language rows have 0.25
    },
    "pretraining": {
        # Table 1: 3,000 steps of ten layers
        "unrolled": {"class": "Pretraining", "steps": 3000, "layers": 10, "of_steps": None},
    },
    "penalty": {
        # one probe, as deq; weight and frequency 1 are ours, Table 3's rows have their own
        "jacobian": {
            **{"class": "Penalty", "regularizer": {"class": "JacobianRegularizer", "num_probes": 1}, "weight": 1.0},
            **{"frequency": 1.0, "increment": 0.0, "increment_every": None, "stop_step": None, "of_steps": None},
        },
    },
    "jitter": {"below": {"class": "Jitter", "below": 2}},  # deq: rand_f_thres_delta 2
    "monitor": {
        # Figure 2: k = 5 and lambda = 0.5; the measuring itself is ours
        "cosine": {
            **{"class": "Monitor", "every": 100, "radius_steps": 20, "lam": 0.5},
            "exact_solver": {"class": "Anderson", "max_steps": 200, "memory": 200, "tol": 1e-4},
            "compare": {"upg": {"class": "UPG", "k": 5, "lam": 0.5}, "npg": {"class": "NPG", "k": 5, "lam": 0.5}},
        },
        "radius": {"class": "Monitor", "every": 100, "radius_steps": 20, "lam": 0.5},
    },
    # ours
    "scale": {
        "cpu": {"scale": "cpu", "epochs": 8, "repeats": 3},
        "gpu": {"scale": "gpu", "epochs": 20, "steps": 8000, "repeats": 1},
        "paper": {"scale": "paper"},
        "smoke": {"scale": "smoke", "epochs": 1, "subset": 2560, "test_subset": 512, "repeats": 1},
    },
    "grad": {
        "bptt": {"class": "BPTT", "num_steps": 10, "lam": 1.0, "checkpoint": False},  # ten layers, as pretraining
        "implicit": {"class": "Implicit"},
        "npg": {"class": "NPG", "k": 5, "lam": 0.5},  # A(5, 0.5) of the paper
        "one_step": {"class": "OneStep"},  # Fung et al. 2022
        "shine": {"class": "SHINE"},
        "upg": {"class": "UPG", "k": 5, "lam": 0.5, "checkpoint": False},
    },
}
# relative 1e-3 is deq's; window 6 and mixing 1 too, the relative ridge is ours
ANDERSON = {"class": "Anderson", "max_steps": 22, "memory": 6, "lam": 1.0, "ridge": 1e-6}
FIXED_POINT = {"class": "FixedPoint", "max_steps": 30, "lam": 1.0}
BROYDEN = {"class": "Broyden", "max_steps": 22, "memory": None, "kernels": False}  # Table 1
RELATIVE = {"tol": 1e-3, "stop": "relative", "norm": "l2", "sync_every": 1}
PINNED["solver"] = {
    "anderson": ANDERSON | RELATIVE,
    # the official vision code: the root mean square of the residual, below 1e-5
    "broyden": BROYDEN | {"tol": 1e-5, "stop": "absolute", "norm": "rms", "sync_every": 1},
    "fixed_point": FIXED_POINT | RELATIVE,
    "rollout": ROLLOUT,
}
PINNED["eval_solver"] = PINNED["solver"]
# the official vision code runs its backward solve for as many steps as the forward one
PINNED["adjoint_solver"] = {
    **{"anderson": ANDERSON | RELATIVE, "fixed_point": FIXED_POINT | RELATIVE},
    "broyden": BROYDEN | RELATIVE | {"tol": None},
}
PINNED["model"] |= MODELS
PINNED["data"] |= DATA
PINNED["course"] = COURSES
