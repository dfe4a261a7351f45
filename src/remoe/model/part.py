"""A part of a model: some neighbouring layers, and what is at their end of the model."""

from torch import nn

from remoe.model.causal_lm import ReMoEForCausalLM


def layers_of_part(num_layers: int, num_parts: int, index: int) -> range:
    """The layers of one of so many parts: as even as can be, the first ones longer, for the last has the head too."""
    size, longer = divmod(num_layers, num_parts)
    start = index * size + min(index, longer)
    return range(start, start + size + (index < longer))


def keep_part(model: ReMoEForCausalLM, layers: range) -> None:
    """Let go of everything but these layers, in place: the embedding stays with the first one, norm and head with the
    last. Names of parameters stay as they are. What all layers share (router cell, relative positions) stays too, and
    a tied embedding at both ends.
    """
    decoder, num_layers = model.model, model.config.num_layers
    decoder.own_layers = layers
    model.has_head = layers.stop == num_layers
    for index in range(num_layers):
        if index not in layers:
            setattr(decoder.layers, str(index), None)  # a module's place stays, and with it the names of the others
    if layers.start > 0 and not (model.has_head and model.config.tie_embeddings):
        setattr(decoder, "embed_tokens", None)  # noqa: B010
    if not model.has_head:
        decoder.norm = nn.Identity()
        model.lm_head = None


def shared_by_parts(model: ReMoEForCausalLM) -> list[nn.Parameter]:
    """The trained parameters that every part has."""
    modules = (model.model.router_cell, model.model.positions)
    return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
