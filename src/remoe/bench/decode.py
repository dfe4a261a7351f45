"""Text from a model: prefill and decoding at small and large batches, ReLU and Top-K in turn, and transformers.

Weights are bf16 on a GPU; routing is set as `steady` says. New tokens are sampled at temperature 1: greedy text of an
untrained model repeats itself, and so does its routing. A decoded token's time is the difference of two lengths, which
leaves out what a call costs once.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe.bench import steady
from remoe.bench.arms import collect_garbage, mixtral
from remoe.bench.clock import Clock
from remoe.bench.fresh import fresh_model, random_batch, twin_with_router
from remoe.bench.limits import TextLimits, measure_limits
from remoe.bench.results import Results, Row, Show, first_line
from remoe.model import ReMoEForCausalLM
from remoe.training.config import TrainConfig

Generate = Callable[[Tensor, int], Tensor]
PEERS = {"transformers": None, "transformers_static": "static"}
"""By name: the kind of cache; transformers compiles decoding with a static one."""
LOGIT_TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""How far below the best logit (of unit spread) of an uncached pass a greedy token may be."""


@dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """What to measure."""

    configs: dict[str, TrainConfig]
    peers: list[str]
    device: torch.device
    prompt: tuple[int, int] = (16, 1024)
    """Sequences and tokens of the prefill."""
    batches: tuple[int, ...] = (1, 64)
    context: int = 128
    """Tokens before the first that is decoded."""
    new_tokens: int = 64
    repeats: int = 5
    path: Path | None = None
    show: Show | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def bench_decode(bench: DecodeBench) -> Results:
    """Measure every config; `results.check()` then raises where cached and uncached passes disagree."""
    limits = measure_limits(Clock(bench.device), bench.dtype)
    about = {"dtype": str(bench.dtype).removeprefix("torch."), "limits": vars(limits)}
    results = Results("decode", bench.path, bench.show, **about)
    for name, config in bench.configs.items():
        limit = TextLimits(limits=limits, config=config.model)
        for measure in (_ours, *(partial(_peer, peer=peer) for peer in bench.peers)):
            for row in measure(bench, config):
                results.add({"model": name, **row, **_limit(bench, limit, row)})
            collect_garbage()
    results.write()
    return results


@torch.no_grad()
def _ours(bench: DecodeBench, config: TrainConfig) -> list[Row]:
    model = fresh_model(dataclasses.replace(config.model, router="relu"), bench.device, bench.dtype)
    models = {"relu": model, "topk": twin_with_router(model, "topk")}
    steady.share_a_direction(model)
    prompt_BS = _prompt(bench, config, *bench.prompt)
    wrong: list[str] = []
    for router, arm in models.items():
        arm.eval()
        steady.settle(arm, prompt_BS)
        wrong += [f"{router}: {text}" for text in _wrong_tokens(bench, arm, prompt_BS)]
    arms = {router: _sampled(arm) for router, arm in models.items()}
    density = {router: _density(arm, _prompt(bench, config, 4, bench.context)) for router, arm in models.items()}
    rows = [row | {"kind": "ours", "density": density[row["candidate"]]} for row in _rows(bench, config, arms)]
    return [rows[0] | ({"mismatches": wrong} if wrong else {}), *rows[1:]]


def _peer(bench: DecodeBench, config: TrainConfig, peer: str) -> list[Row]:
    try:
        model = mixtral(config, None, bench.device).to(bench.dtype).eval()
        rows = _rows(bench, config, {peer: _hf_sampled(model, PEERS[peer])})
        experts = model.config._experts_implementation
        return [row | {"kind": "peer", "experts_implementation": experts} for row in rows]
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way; ours still counts
        return [{"candidate": peer, "kind": "peer", "error": first_line(error)}]


def _rows(bench: DecodeBench, config: TrainConfig, arms: dict[str, Generate]) -> list[Row]:
    sequences, length = bench.prompt
    prefill = _in_turn(bench, arms, _prompt(bench, config, sequences, length), (1,))
    rows = [_row(arm, "prefill", seconds[0], (sequences, length)) for arm, seconds in prefill.items()]
    for batch in bench.batches:
        prompt_BS = _prompt(bench, config, batch, bench.context)
        times = _in_turn(bench, arms, prompt_BS, (1 + bench.new_tokens, 1 + 2 * bench.new_tokens))
        for arm, (short, long) in times.items():
            extra = [b - a for a, b in zip(short, long, strict=True)]
            row = _row(arm, "decode", extra, (batch, bench.new_tokens))
            rows.append(row | {"ms_per_token": statistics.median(extra) * 1e3 / bench.new_tokens})
    return rows


def _row(arm: str, phase: str, seconds: list[float], sizes: tuple[int, int]) -> Row:
    return {
        "candidate": arm,
        "phase": phase,
        "batch": sizes[0],
        "tokens_per_second": sizes[0] * sizes[1] / statistics.median(seconds),
        "all_seconds": seconds,
    }


def _limit(bench: DecodeBench, limit: TextLimits, row: Row) -> Row:
    """What the machine could do at best in a row's phase."""
    if "batch" not in row:
        return {}
    context = bench.context + bench.new_tokens * 3 // 2  # half way through the tokens that are timed
    best = limit.prefill() if row["phase"] == "prefill" else limit.decode(row["batch"], context)
    return {"limit_tokens_per_second": best}


def _in_turn(
    bench: DecodeBench, arms: dict[str, Generate], prompt_BS: Tensor, lengths: Sequence[int]
) -> dict[str, list[list[float]]]:
    """Seconds of each repeat by arm and number of new tokens, after two not counted (compilation, graphs)."""
    times: dict[str, list[list[float]]] = {arm: [[] for _ in lengths] for arm in arms}
    for repeat in range(bench.repeats + 2):
        for (arm, generate), (index, new) in itertools.product(arms.items(), enumerate(lengths)):
            seconds = _seconds(partial(generate, prompt_BS, new), bench.device)
            if repeat >= 2:
                times[arm][index].append(seconds)
    return times


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _sampled(model: ReMoEForCausalLM) -> Generate:
    return lambda prompt_BS, new: model.generate(prompt_BS, new, temperature=1.0)


def _hf_sampled(model: Any, cache: str | None) -> Generate:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "pad_token_id": 0}
    if cache is not None:
        settings["cache_implementation"] = cache

    def generate(prompt_BS: Tensor, new: int) -> Tensor:
        sizes = {"max_new_tokens": new, "min_new_tokens": new}
        return model.generate(prompt_BS, attention_mask=torch.ones_like(prompt_BS), **sizes, **settings)

    return generate


def _wrong_tokens(bench: DecodeBench, model: ReMoEForCausalLM, prompt_BS: Tensor) -> list[str]:
    """Greedy tokens that are not the best ones of a pass over the whole text without a cache."""
    length = min(bench.context, prompt_BS.shape[1])
    text_BS = model.generate(prompt_BS[:2, :length], 8)
    logits_BSV = model(text_BS).logits[:, length - 1 : -1].float()
    chosen_BS1 = logits_BSV.gather(-1, text_BS[:, length:, None])
    gap = float((logits_BSV.amax(-1, keepdim=True) - chosen_BS1).max())
    allowed = LOGIT_TOLERANCE[bench.dtype]
    return [] if gap <= allowed else [f"a decoded token is {gap:.3f} below the best logit, allowed {allowed}"]


def _density(model: ReMoEForCausalLM, prompt_BS: Tensor) -> float:
    """Of the tokens that the model adds to a prompt."""
    length = prompt_BS.shape[1]
    text_BS = model.generate(prompt_BS, 16, temperature=1.0)
    maps = [routing.routing_map_TE for routing in model(text_BS).routings if routing is not None]
    new = [map_TE.view(*text_BS.shape, -1)[:, length:].float().mean() for map_TE in maps]
    return float(torch.stack(new).mean())


def _prompt(bench: DecodeBench, config: TrainConfig, sequences: int, length: int) -> Tensor:
    return random_batch(config.model, sequences, length, seed=1).tokens_BS.to(bench.device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
