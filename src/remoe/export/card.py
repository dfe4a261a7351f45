"""The model card of an export: what the model is, what was measured of it, how to load it."""

import json
import math
from pathlib import Path

from remoe.data.tokenizer import BytesTokenizer, Tokenizer
from remoe.export.transformers_files import missing_in_transformers
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.config import router_without_values
from remoe.model.size import parameter_count
from remoe.training.metrics import Metrics, last_value, late_values
from remoe.training.run import Run

_CARD = """\
---
{heading}
---

# {name}

A {kind} language model trained with remoe.

| model | |
|---|---|
{model}
{measured}
## Use

With remoe:

```python
import remoe

model = remoe.load("{folder}")  # in eval mode; model(tokens_BS).logits
```

{transformers}"""

_TRANSFORMERS = """\
With transformers 5, whether remoe is installed or not:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```
"""

_MEASURED = """
## Measured

{provenance}

| figure | |
|---|---|
{rows}
"""


def model_card(
    model: ReMoEForCausalLM, tokenizer: Tokenizer, folder: Path, run: Run | None, metrics: list[Metrics]
) -> str:
    """The README.md of an export. `metrics` are the run's, up to the step of the weights; none: no figures."""
    reason = missing_in_transformers(model.config)
    return _CARD.format(
        heading=_heading(model.config, in_transformers=reason is None),
        name=run.config.name if run else folder.name,
        kind="mixture-of-experts" if model.config.num_moe_layers else "dense",
        model=_table(_model_rows(model.config, tokenizer)),
        measured=_measured(run, metrics, tokenizer) if run and metrics else "",
        folder=folder.name,
        transformers=_TRANSFORMERS.format(folder=folder.name) if reason is None else f"With remoe alone: {reason}.\n",
    )


def _heading(config: ReMoEConfig, in_transformers: bool) -> str:
    tags = ["remoe", "mixture-of-experts", *([config.moe.router_name] if config.num_moe_layers else ["dense"])]
    library = "transformers" if in_transformers else "remoe"
    return f"library_name: {library}\npipeline_tag: text-generation\ntags: {json.dumps(tags)}"


def _model_rows(config: ReMoEConfig, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    size = parameter_count(config)
    moe = config.moe
    rows = [
        ("parameters", f"{size.total:,}; {size.active:,} active per token at the target density"),
        ("shape", f"{config.num_layers} layers of width {config.hidden_size}, {config.num_heads} heads"),
        ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"),
    ]
    if not config.num_moe_layers:
        return [("router", "none (dense)"), *rows]
    experts = f"{moe.routed_experts} a layer in {config.num_moe_layers} layers, {moe.routed_top_k} a token"
    is_mean = router_without_values(moe).penalty == "sparsity_l1"
    rows = [("router", moe.router_name), ("experts", experts + (" on average" if is_mean else "")), *rows]
    return [*rows, ("thresholds of the density dial", str(config.thresholds))] if config.thresholds else rows


def _measured(run: Run, metrics: list[Metrics], tokenizer: Tokenizer) -> str:
    config, tokens = run.config, last_value(metrics, "tokens", 0)
    provenance = (
        f"By the run itself, at step {last_value(metrics, 'step', 0)}: {tokens:,} tokens of `{_data_name(run)}` in "
        f"sequences of {config.data.sequence_length}, seed {config.seed}, precision {config.train.precision}. Losses "
        "are in nats a token, on text that was held out."
    )
    return _MEASURED.format(provenance=provenance, rows=_table(_figures(metrics, tokenizer)))


def _data_name(run: Run) -> str:
    """The training data as the config names it, without the folders of the machine it was on."""
    train = run.config.data.train
    names = [Path(str(part)).name for part in train] if isinstance(train, list) else [Path(str(train)).name]
    return ", ".join(names)


def _figures(metrics: list[Metrics], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """What was measured; figures that the run did not measure are left out."""
    loss = last_value(metrics, "valid_loss", None)
    rows = [] if loss is None else [("validation loss", f"{loss:.4f}"), ("perplexity", f"{math.exp(loss):.3f}")]
    if loss is not None and isinstance(tokenizer, BytesTokenizer):
        rows.append(("bits per byte", f"{loss / math.log(2):.4f}"))
    by_domain = last_value(metrics, "valid_loss_per_domain", {})
    if len(by_domain) > 1:
        rows += [(f"validation loss, {domain}", f"{value:.4f}") for domain, value in by_domain.items()]
    rows += _routing_figures(metrics)
    speeds = late_values(metrics, "tokens_per_second")
    return [*rows, ("training tokens a second, late", f"{sum(speeds) / len(speeds):,.0f}")] if speeds else rows


def _routing_figures(metrics: list[Metrics]) -> list[tuple[str, str]]:
    """Of routed models, over the last quarter of the steps."""
    active = last_value(metrics, "valid_active_experts", None)
    rows = [] if active is None else [("active experts a token, validation", f"{active:.3f}")]
    sparsity = late_values(metrics, "sparsity")
    if sparsity:
        rows.append(("sparsity in training, late", f"{sum(sparsity) / len(sparsity):.4f}"))
    layers = last_value(metrics, "layers", {})
    if layers.get("no_expert"):
        rows.append(("tokens without an expert, by layer", ", ".join(f"{share:.1%}" for share in layers["no_expert"])))
        rows.append(("idle experts, by layer", ", ".join(str(number) for number in layers["idle_experts"])))
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows)
