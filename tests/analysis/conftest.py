"""Three made-up runs with the shape of real ones, and three tiny real ones: ReLU, Top-K and dense."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe.analysis.collect import TextCounts
from remoe.analysis.metrics import Metrics
from remoe.analysis.record import Generation, Passage, RunRecord
from remoe.config import from_dict
from remoe.eval.density import ONE_NUMBER, PER_LAYER, TRAINED, DensityCurve, DensityPoint
from remoe.training import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # the browser client that also takes README's pictures

DOMAINS = ("c++ headers", "licences", "prose", "python", "stubs", "numeric <python>")
LAYERS, EXPERTS, STEPS = 4, 8, 300
WORDS = ("the", " of", "\n", "def", " return", "<script>alert(1)</script>", " $x$", "=1+1", "é", "self", "(", ")", ":")


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory) -> list[Path]:
    """Three runs of 30 steps, really trained: ReLU, Top-K and dense."""
    folder = tmp_path_factory.mktemp("runs")
    return [trained(folder, "relu", "relu"), trained(folder, "topk", "topk"), trained(folder, "dense", "relu", "none")]


@pytest.fixture(scope="session")
def runs() -> list[RunRecord]:
    return make_runs()


def corpus_of(folder: Path) -> Path:
    rows = []
    for i in range(120):
        rows.append({"text": f"def f{i}(x):\n    return x + {i}  # <script>alert({i})</script>\n" * 3, "kind": "code"})
        rows.append({"text": f"The {i}th sentence tells of rivers, towns and {i % 7} hills. " * 3, "kind": "prose"})
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(folder: Path, name: str, router: str, moe_layers: str = "all") -> Path:
    values = {
        "name": name,
        "model": {
            "hidden_size": 32, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32,
            "num_experts": 4, "router": router, "moe_layers": moe_layers,
        },
        "data": {
            "train": str(corpus_of(folder)), "domain_field": "kind", "sequence_length": 64, "cache": folder / "cache",
            "validation_fraction": 0.2,
        },
        "sparsity": {"init": 1e-3},
        "train": {
            "steps": 30, "batch_size": 4, "validation_interval": 10, "validation_batches": 4, "flip_interval": 5,
            "checkpoint_interval": 30,
        },
    }  # fmt: skip
    return train(from_dict(TrainConfig, values), root=folder / "runs").path


def make_runs() -> list[RunRecord]:
    return [make_run("relu", "relu", 0.0), make_run("topk", "topk", 0.03), make_run("dense", "dense", 0.1)]


def make_run(name: str, router: str, worse: float) -> RunRecord:
    rng = np.random.default_rng(len(name))
    counts = None if router == "dense" else make_counts(rng, router)
    return RunRecord(
        name=name,
        router=router,
        config={"name": name, "model": {"num_experts": EXPERTS, "top_k": 1, "router": router}},
        corpus={"domains": {domain: {"documents": 12, "bytes": 345678} for domain in DOMAINS}},
        total_parameters=4_321_000,
        active_parameters=1_234_000,
        metrics=Metrics(tuple(make_row(rng, router, step, worse) for step in range(1, STEPS + 1))),
        counts=counts,
        token_texts=() if counts is None else tuple(WORDS[i % len(WORDS)] + str(i) for i in counts.token_ids_U),
        passages=() if counts is None else tuple(make_passage(rng, router, domain) for domain in DOMAINS),
        generations=tuple(
            Generation(domain=domain, prompt="def f(x):\n    return", continuation=" <b>x</b> + 1\n" * 4)
            for domain in DOMAINS
        ),
        density=make_density() if router == "relu" else None,
    )


def make_density() -> DensityCurve:
    def point(kind: str, target: float | None, loss: float) -> DensityPoint:
        thresholds = (0.25 * (1 - target),) * LAYERS if target else (0.0,) * LAYERS
        return DensityPoint(
            kind=kind, target=target, thresholds=thresholds, loss=loss, active_experts=target or 1.0
        )  # fmt: skip

    points = (
        point(PER_LAYER, 0.5, 2.1), point(ONE_NUMBER, 0.5, 2.3), point(PER_LAYER, 0.75, 2.02),
        point(ONE_NUMBER, 0.75, 2.04), point(TRAINED, None, 2.0), point(PER_LAYER, 1.5, 2.03),
        point(ONE_NUMBER, 1.5, 2.05),
    )  # fmt: skip
    return DensityCurve(num_experts=EXPERTS, top_k=1, calibration_tokens=8192, tokens=16384, points=points)


def make_row(rng: np.random.Generator, router: str, step: int, worse: float) -> dict[str, Any]:
    loss = 2.0 + worse + 3.5 * np.exp(-step / 40) + 0.05 * rng.standard_normal()
    row: dict[str, Any] = {"step": step, "tokens": step * 4096, "lm_loss": loss, "loss": loss, "lr": 1e-3}
    row |= {"tokens_per_second": 9000 + 500 * rng.random(), "step_seconds": 0.4, "grad_norm": 1.0, "skipped": 0}
    if step % 50 == 0:
        row |= {"valid_loss": loss + 0.02}
        row["valid_loss_per_domain"] = {domain: loss + 0.1 * i for i, domain in enumerate(DOMAINS)}
    if router == "dense":
        return row | {"sparsity": None, "sparsity_coef": None, "sparsity_l1": None, "layers": {}}
    sparsity = 0.875
    if router == "relu":
        sparsity = min(0.875 + 0.006 * rng.standard_normal(), 0.5 + 0.375 * max(0.0, (step - 70) / 30))
    row |= {"sparsity": sparsity, "active_experts": EXPERTS * (1 - sparsity)}
    row |= {"sparsity_coef": None, "sparsity_l1": None}
    if router == "relu":
        row |= {"sparsity_coef": 1e-8 * 1.2 ** min(step, 96) * 1.002**step, "sparsity_l1": 1.1 * np.exp(-step / 90)}
    if step % 10 == 0:
        rate = (0.01 if router == "relu" else 0.025) * (1 + 2 * np.exp(-step / 30)) * (1 + 0.1 * rng.standard_normal())
        row |= {"flip_rate": rate, "flip_count": rate * EXPERTS}
    row["layers"] = {"sparsity": [sparsity + 0.02 * (layer - 1.5) * (router == "relu") for layer in range(LAYERS)]}
    return row


def make_counts(rng: np.random.Generator, router: str) -> TextCounts:
    tokens_D = np.array([4000, 1500, 4000, 4000, 3000, 4000])
    taste_LDE = rng.dirichlet([0.7] * EXPERTS, size=(LAYERS, len(DOMAINS)))
    load_LDE = (taste_LDE * tokens_D[:, None]).astype(np.int64)
    if router == "relu":
        load_LDE = (load_LDE * np.linspace(0.7, 1.3, LAYERS)[:, None, None]).astype(np.int64)
    ids_U = np.arange(0, 120)
    occurrences_U = np.maximum(1, (4000 / (1 + np.arange(120))).astype(np.int64))
    mean_U = np.linspace(0.6, 2.4, 120) + 0.2 * rng.standard_normal(120) if router == "relu" else np.ones(120)
    share_NEU = rng.dirichlet([0.2] * EXPERTS, size=(1, 120)).transpose(0, 2, 1)
    by_active_LA = np.zeros((LAYERS, EXPERTS + 1), dtype=np.int64)
    by_active_LA[:, 1] = tokens_D.sum()
    if router == "relu":
        by_active_LA[:, 0] = 2000
    return TextCounts(
        layers=tuple(range(LAYERS)),
        top_k=1,
        domains=DOMAINS,
        tokens_D=tokens_D,
        load_LDE=load_LDE,
        tokens_by_active_LA=by_active_LA,
        token_ids_U=ids_U,
        occurrences_U=occurrences_U,
        active_U=(mean_U * occurrences_U * LAYERS).astype(np.int64),
        token_layers=(2,),
        token_load_NEU=(share_NEU * occurrences_U).astype(np.int64),
    )


def make_passage(rng: np.random.Generator, router: str, domain: str) -> Passage:
    words = tuple(WORDS[i] for i in rng.integers(0, len(WORDS), 200))
    active_TL = np.ones((200, LAYERS), dtype=np.int64)
    if router == "relu":
        active_TL = rng.poisson(1.1, (200, LAYERS)).astype(np.int64)
    return Passage(domain=domain, tokens=words, active_TL=active_TL)
