"""`remoe convert --from megatron`."""

from pathlib import Path

from typer import Context

from remoe.errors import ConfigError

USED = ("source", "to", "tokenizer", "source_format")


def refuse_unused(context: Context) -> None:
    """Raise ConfigError for an option of `remoe convert` that would do nothing here."""
    for option in context.command.params:
        name = str(option.name)
        given = context.get_parameter_source(name)
        if name not in USED and given is not None and given.name == "COMMANDLINE":
            raise ConfigError(f"{option.opts[0]} does nothing with --from megatron, must be left out")


def convert_from_megatron(source: Path, to: Path, tokenizer: str | None) -> str:
    """Write a Megatron checkpoint as a model's folder; what to print about it."""
    from remoe.convert.megatron import convert_megatron

    converted = convert_megatron(source, to, tokenizer)
    config = converted.model.config
    lines = [
        f"{to}: iteration {converted.iteration}, {config.num_layers} layers, router {config.moe.router_name}, "
        f"{config.moe.routed_experts} experts of which {config.moe.routed_top_k} a token"
    ]
    if converted.sparsity_coef is not None:
        lines.append(f"sparsity coefficient {converted.sparsity_coef:.4g}, of the released code's sum over layers")
    if tokenizer is None:
        lines.append("without a tokenizer: give it --tokenizer gpt2:FOLDER to export the model or to generate with it")
    return "\n".join(lines)
