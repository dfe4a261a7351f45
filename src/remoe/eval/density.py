"""The curve of the density dial: loss against active experts a token, and thresholds for a wished number of them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remoe.data import Batch, DataConfig
from remoe.data.sampler import NO_LABEL, joined
from remoe.errors import CheckpointError, ConfigError, DataError
from remoe.eval.cut_costs import Cut, cheapest_density
from remoe.eval.held_out import Load, Opened, open_model_and_text
from remoe.export import check_new, write_export
from remoe.model.thresholds import set_thresholds
from remoe.moe import dial
from remoe.training.loading import load
from remoe.training.micro_batch import to_device
from remoe.training.saved import run_of, tokenizer_of
from remoe.training.validation import evaluating, token_mask

SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.25, 1.5)
"""Of the trained density: the targets where none are given."""
KEPT = (0.85, 0.7, 0.55, 0.4, 0.25, 0.0)
"""Shares of a layer's active experts that its measured cuts keep."""
TRAINED, PER_LAYER, ONE_NUMBER = "trained", "per_layer", "one_number"


@dataclass(frozen=True, kw_only=True)
class DensityPoint:
    """One setting of the dial. `kind`: trained (as saved), per_layer, or one_number for all layers.

    `loss` is in nats a token and `active_experts` a token and MoE layer, both on text that set no threshold; `target`
    is the wished number (None: as saved).
    """

    kind: str
    target: float | None
    thresholds: tuple[float, ...]
    loss: float
    active_experts: float


@dataclass(frozen=True, kw_only=True)
class DensityCurve:
    """Loss against density for one model, from the fewest experts to the most."""

    num_experts: int
    top_k: int
    calibration_tokens: int
    tokens: int
    points: tuple[DensityPoint, ...]

    @property
    def trained(self) -> DensityPoint:
        """The model as it was saved."""
        return next(point for point in self.points if point.kind == TRAINED)

    def of_kind(self, kind: str) -> list[DensityPoint]:
        """The points of one kind, and the trained one, which belongs to each."""
        return [point for point in self.points if point.kind in (kind, TRAINED)]

    def at(self, target: float, kind: str = PER_LAYER) -> DensityPoint:
        """The thresholds that were chosen for a target."""
        return next(point for point in self.points if (point.kind, point.target) == (kind, target))


@dataclass(frozen=True, kw_only=True)
class DensityConfig:
    """How the curve is measured. `targets`: active experts a token and MoE layer; empty: shares of the trained ones.

    The first `calibration_sequences` of the text choose thresholds, the next `sequences` measure.
    """

    targets: tuple[float, ...] = ()
    calibration_sequences: int = 32
    sequences: int = 64
    batch_size: int = 16
    device: str = "auto"


def measure_density(
    path: Path,
    data: DataConfig | None = None,
    config: DensityConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
    load: Load = load,
) -> DensityCurve:
    """Measure the curve of a run, checkpoint or export on its own validation text, or on `data`.

    `report` gets a line of text as each part is done. Raises ConfigError for a model without ReLU gates or a target
    that it cannot reach, DataError for too short a text, and what `evaluate_checkpoint` raises.
    """
    config = config or DensityConfig()
    opened = open_model_and_text(Path(path), data, config.device, load)
    _check(opened.model, config.targets)
    batches = list(opened.sequences(config.calibration_sequences + config.sequences, 1))
    if len(batches) <= config.calibration_sequences:
        raise DataError(
            f"the text has {len(batches)} sequences, must have more than the {config.calibration_sequences} that "
            "choose thresholds; give a longer text or lower --calibration-sequences"
        )
    first, rest = batches[: config.calibration_sequences], batches[config.calibration_sequences :]
    calibration, measured = (_in_batches(part, config.batch_size) for part in (first, rest))
    return _Meter(opened, calibration, measured, report).curve(config.targets)


class _Meter:
    """A model, text to choose thresholds on, and other text to measure them on."""

    def __init__(
        self, opened: Opened, calibration: list[Batch], batches: list[Batch], report: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.opened = opened
        self.model = opened.model
        self.experts = _experts(self.model)
        self.calibration = calibration
        self.together = to_device(joined(calibration), next(self.model.parameters()).device)
        self.mask_BS = token_mask(self.together)
        self.counted_T = None if self.mask_BS is None else self.mask_BS.flatten()
        self.batches = batches
        self.report = report
        self.saved = dial.thresholds(self.model)

    def curve(self, targets: Sequence[float]) -> DensityCurve:
        """All points; the model is left as it was."""
        num_experts = self.experts.routed_experts
        logits, trained_L = self._look()
        trained = self._measure(TRAINED, None)
        mean = sum(trained_L) / len(trained_L)
        targets = targets or [round(share * mean, 3) for share in SHARES if share * mean <= num_experts]
        cuts_L = self._all_cuts(trained_L) if min(targets) < mean else []
        points = [trained]
        for target in targets:
            wished_L = cheapest_density(trained_L, cuts_L, target, num_experts)
            points.append(self._measure(PER_LAYER, target, self._choose(wished_L)))
            shared = dial.threshold_for(logits, round(target * logits.numel() / num_experts))
            points.append(self._measure(ONE_NUMBER, target, [shared] * len(trained_L)))
        return DensityCurve(
            num_experts=num_experts,
            top_k=self.experts.routed_top_k,
            calibration_tokens=_num_labels(self.calibration),
            tokens=_num_labels(self.batches),
            points=tuple(sorted(points, key=lambda point: point.active_experts)),
        )

    def _look(self) -> tuple[torch.Tensor, list[float]]:
        """All routers' logits on the calibration text, and the experts a token that each layer uses."""
        with dial.recorded(self.model) as outputs:
            self._route()
        logits_L = [dial.counted(output.logits_TE, self.counted_T) for output in outputs]
        saved_L = zip(logits_L, self.saved, strict=True)
        return torch.cat(logits_L), [int((logits_TE > least).sum()) / len(logits_TE) for logits_TE, least in saved_L]

    def _all_cuts(self, trained_L: list[float]) -> list[list[Cut]]:
        base = self._calibration_loss()
        return [self._cuts(layer, trained_L, base) for layer in range(len(trained_L))]

    def _cuts(self, layer: int, trained_L: list[float], base: float) -> list[Cut]:
        cuts: list[Cut] = []
        for kept in KEPT:
            wished_L = [active * (kept if index == layer else 1) for index, active in enumerate(trained_L)]
            with dial.thresholds_at(self.model, self._choose(wished_L)):
                cost = self._calibration_loss() - base
            cuts.append(Cut(removed=(1 - kept) * trained_L[layer], cost=cost))
        self.report(f"layer {layer + 1} of {len(trained_L)}: loss {cuts[-1].cost:+.4f} without its experts")
        return cuts

    def _choose(self, wished_L: list[float]) -> list[float]:
        """The thresholds that give each layer so many experts a token on the calibration text."""
        with dial.thresholds_at(self.model, self.saved):
            with dial.choosing_thresholds(self.model, wished_L, self.counted_T):
                self._route()
            return dial.thresholds(self.model)

    def _measure(self, kind: str, target: float | None, thresholds: list[float] | None = None) -> DensityPoint:
        thresholds = self.saved if thresholds is None else thresholds
        with dial.thresholds_at(self.model, thresholds):
            result = self.opened.evaluate(self.batches)
        point = DensityPoint(
            kind=kind,
            target=target,
            thresholds=tuple(thresholds),
            loss=result["loss"],
            active_experts=result["active_experts"],
        )
        self.report(f"{kind.replace('_', ' ')}: loss {point.loss:.4f} with {point.active_experts:.3f} experts a token")
        return point

    def _calibration_loss(self) -> float:
        return self.opened.evaluate(self.calibration)["loss"]

    def _route(self) -> None:
        """Let all routers see the calibration text in one call."""
        document_BS = self.together.document_BS if self.opened.config.data.document_mask else None
        with evaluating(self.model):
            self.model(self.together.tokens_BS, self.mask_BS, document_BS=document_BS)


def save_curve(curve: DensityCurve, path: Path) -> None:
    """Write a curve as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(curve), indent=1) + "\n", encoding="utf-8")


def load_curve(path: Path) -> DensityCurve:
    """Read what `save_curve` wrote; CheckpointError for anything else."""
    try:
        return curve_from(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not a density curve; `remoe density RUN` writes one") from None


def save_at(point: DensityPoint, path: Path, to: Path) -> None:
    """Write the model at `path` as an export with a point's thresholds in force; `to` is new or empty."""
    check_new(to)
    model, tokenizer = load(path), tokenizer_of(path)
    set_thresholds(model, point.thresholds)
    write_export(model, tokenizer, to, run_of(path), source=path, is_changed=True)


def curve_from(values: dict[str, Any]) -> DensityCurve:
    """The curve in plain values."""
    points = tuple(DensityPoint(**point | {"thresholds": tuple(point["thresholds"])}) for point in values["points"])
    return DensityCurve(**{**values, "points": points})


def _experts(model: Any) -> Any:
    """The counts of a model's experts: in its config, or that of its MoE layers."""
    return getattr(model.config, "moe", model.config)


def _check(model: Any, targets: Sequence[float]) -> None:
    num_experts = _experts(model).routed_experts
    if not dial.dials(model):
        router = model.config.moe.router_name if model.config.num_moe_layers else "dense"
        raise ConfigError(
            f"the model is {router}, must have ReLU gates (router relu or recurrent_relu) for a threshold"
        )
    wrong = [target for target in targets if not 0 <= target <= num_experts]
    if wrong:
        raise ConfigError(f"a target is {wrong[0]}, must be between 0 and the layer's {num_experts} experts")


def _in_batches(batches: Sequence[Batch], size: int) -> list[Batch]:
    return [joined(batches[start : start + size]) for start in range(0, len(batches), size)]


def _num_labels(batches: Sequence[Batch]) -> int:
    return sum(int((batch.labels_BS != NO_LABEL).sum()) for batch in batches)
