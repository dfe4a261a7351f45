"""Models with new values, drawn where they live, and twins that share their experts."""

import dataclasses

import torch
from torch import nn

from remoe.bench.steady import settable_layers
from remoe.data import Batch
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.init import initial_of
from remoe.moe.initial import Constant, Normal


def fresh_model(config: ReMoEConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> ReMoEForCausalLM:
    """A model as training starts it, but drawn on the device: 5.7 billion numbers take a CPU minutes.

    The head is wider, for logits of unit size: with tiny ones a loss would not show that something is wrong.
    """
    with torch.device("meta"):
        model = ReMoEForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    _draw(model, config)
    return model


def twin_with_router(model: ReMoEForCausalLM, router: str) -> ReMoEForCausalLM:
    """A model with the same parameters but for its own routers of another kind."""
    config = dataclasses.replace(model.config, router=router)
    with torch.device("meta"):
        twin = ReMoEForCausalLM(config)
    shared = {name: p for name, p in model.state_dict(keep_vars=True).items() if ".router." not in name}
    twin.load_state_dict(shared, strict=False, assign=True)
    own = next(model.parameters())
    for layer in settable_layers(twin):
        layer.router.to(own.dtype).to_empty(device=own.device)
        _draw(layer.router, config)
    return twin


def random_batch(config: ReMoEConfig, size: int, sequence_length: int, seed: int) -> Batch:
    """Tokens and labels drawn evenly from the vocabulary, each row one document, on the CPU."""
    assert config.vocab_size is not None, "a benchmark's config is resolved"
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, config.vocab_size, (size, sequence_length + 1), generator=generator)
    zeros = torch.zeros(size, sequence_length, dtype=torch.int64)
    return Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), zeros, zeros)


@torch.no_grad()
def _draw(module: nn.Module, config: ReMoEConfig) -> None:
    for name, parameter in module.named_parameters():
        initial = initial_of(name, config)
        if name == "lm_head.weight":
            initial = Normal(config.hidden_size**-0.5)
        if isinstance(initial, Constant):
            parameter.fill_(initial.value)
            continue
        assert isinstance(initial, Normal), "relu and topk routers start as the rest of the model does"
        parameter.normal_(0, initial.std)
