"""`remoe convert`: a Top-K or dense checkpoint with ReLU routing, and back where that is exact."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from remoe.cli.options import AsJson, data_named, existing
from remoe.cli.table import table

if TYPE_CHECKING:
    from remoe.convert.agreement import Conversion

SOURCE = "a run, checkpoint or export, or a folder of transformers: " + (
    "mixtral, llama, olmoe, qwen2_moe, qwen3_moe, deepseek_v2, deepseek_v3, granitemoe"
)


def convert_command(
    context: Context,
    source: Annotated[Path, Argument(metavar="SRC", help=SOURCE, callback=existing)],
    to: Annotated[Path, Option("--to", metavar="DIR", help="folder to write; new or empty")],
    router: Annotated[str, Option(help="relu, or topk: back to Mixtral or Llama, where it is exact")] = "relu",
    data: Annotated[str | None, Option(help="text to fit gates on; by default the run's validation text")] = None,
    tokenizer: Annotated[str | None, Option(help="as data.tokenizer; by default the one in SRC")] = None,
    sequence_length: Annotated[
        int | None, Option(help="tokens a sequence; by default the run's, or 256", min=2)
    ] = None,
    calibration_sequences: Annotated[int, Option(help="sequences that fit gates", min=1)] = 32,
    sequences: Annotated[int, Option(help="sequences after them, to compare on", min=1)] = 32,
    num_experts: Annotated[int, Option(help="dense: copies that each MLP becomes", min=1)] = 8,
    top_k: Annotated[int, Option(help="dense: copies a token shall use after training", min=1)] = 1,
    granularity: Annotated[int, Option(help="dense: slices that each copy is split in", min=1)] = 1,
    source_format: Annotated[str, Option("--from", help="auto, or megatron: a checkpoint of ReMoE's code")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Give a Top-K or dense model ReLU routing.

    Top-K gates are swapped for ReLU gates that use as many experts on average; a dense MLP becomes experts that are all
    on at first. Train on to recover what is lost: `remoe train ... --set train.init_from=DIR`. With --from megatron the
    model stays what it is, and becomes one that all commands take.
    """
    import json

    from remoe.cli.megatron import convert_from_megatron, refuse_unused
    from remoe.config import check_choice
    from remoe.convert.checkpoint import ConvertConfig, convert
    from remoe.convert.own import Upcycling
    from remoe.convert.text import TextSizes
    from remoe.export import check_new

    check_choice("--from", source_format, ("auto", "megatron"))
    check_new(to)
    _check_source(source, source_format)
    _check_text(source, data, tokenizer, is_needed=router == "relu" and source_format == "auto")
    if source_format == "megatron":
        refuse_unused(context)
        print(convert_from_megatron(source, to, tokenizer))
        return
    config = ConvertConfig(
        router=router, data=data, tokenizer=tokenizer, sequence_length=sequence_length,
        sizes=TextSizes(calibration_sequences, sequences),
        upcycling=Upcycling(num_experts=num_experts, top_k=top_k, granularity=granularity),
    )  # fmt: skip
    result = convert(source, to, config)
    print(json.dumps(result.to_dict(), indent=1) if as_json else _text(result, to))


def _check_source(source: Path, source_format: str) -> None:
    """Raise CheckpointError where there is nothing that could be converted."""
    from remoe.errors import CheckpointError
    from remoe.training import checkpoint
    from remoe.training.saved import run_of

    marks = (checkpoint.RECORD, checkpoint.MANIFEST, "config.json")
    if source_format == "auto" and run_of(source) is None and not any((source / mark).is_file() for mark in marks):
        raise CheckpointError(
            f"{source} is not a run, a checkpoint, an export or a folder of transformers with its config.json; "
            "`remoe runs` lists the runs, --from megatron reads a checkpoint of Megatron"
        )


def _check_text(source: Path, data: str | None, tokenizer: str | None, is_needed: bool) -> None:
    """Raise what stands in the way of tokenizing the text, before the weights are read, not after."""
    from remoe.convert.text import tokenizer_for
    from remoe.data import check_validation, load_tokenizer
    from remoe.eval.held_out import text_beside

    if tokenizer is not None:
        load_tokenizer(tokenizer)
    elif is_needed:
        tokenizer = tokenizer_for(source, None)
    if data is not None and is_needed:
        with data_named():
            check_validation(text_beside(source, data, tokenizer=tokenizer))


def _text(result: "Conversion", to: Path) -> str:
    lines = [f"{to}: {result.source} to {result.target}"]
    measured = result.agreement
    if measured is not None:
        lines += [
            f"loss {measured.loss_before:.4f} before, {measured.loss_after:.4f} after, on {measured.tokens:,} tokens",
            f"KL divergence {measured.kl_divergence:.4f} nats a token, same likeliest token {measured.same_top_1:.1%}",
        ]
    if result.active_experts:
        layers = enumerate(zip(result.active_experts, result.overlap, strict=True))
        rows = [(str(layer), f"{active:.3f}", f"{share:.1%}") for layer, (active, share) in layers]
        lines.append(table(("MoE layer", f"active experts (k = {result.top_k})", "Top-K pairs kept"), rows))
    return "\n".join(lines)
