"""torch.export of prefill and decode: one program each, with the tokens chosen by routing that depends on the data."""

import pytest
import torch
from torch import nn
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from remoe import hf

pytestmark = [pytest.mark.heavy, pytest.mark.slow]

PROGRAMS = {
    "relu, our kernels": ("relu", "remoe"),
    "relu, torch alone": ("relu", "grouped_mm"),
    "recurrent_relu, torch alone": ("recurrent_relu", "grouped_mm"),
}
each = pytest.mark.parametrize(("router", "experts"), PROGRAMS.values(), ids=PROGRAMS.keys())


class Prefill(nn.Module):
    """Logits of whole prompts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def in_transformers(model, experts):
    other = hf.from_native(model)
    other.set_experts_implementation(experts)
    return other.requires_grad_(False)


def own_operations(program):
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("remoe.")}


@each
def test_prefill_takes_any_number_of_rows_and_tokens(build, tokens_BS, tmp_path, router, experts):
    model = build(router=router)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", min=2, max=512)}
    prefill = Prefill(in_transformers(model, experts))
    program = torch.export.export(prefill, (tokens_BS,), dynamic_shapes={"input_ids": sizes}, strict=False)
    assert bool(own_operations(program)) == (experts == "remoe")
    torch.export.save(program, tmp_path / "prefill.pt2")
    loaded = torch.export.load(tmp_path / "prefill.pt2").module()
    other_BS = torch.randint(0, 61, (3, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for prompts_BS in (tokens_BS, other_BS):
            torch.testing.assert_close(loaded(prompts_BS), model(prompts_BS).logits, rtol=1e-4, atol=1e-4)


@each
def test_decode_writes_the_text_that_the_model_generates(build, tokens_BS, router, experts):
    model = build(router=router)
    other = in_transformers(model, experts)
    other.generation_config.cache_implementation = "static"
    step = TorchExportableModuleWithStaticCache(other, batch_size=1, max_cache_len=32)
    prompt_1S = tokens_BS[:1]
    inputs = {"input_ids": prompt_1S[:, :1], "cache_position": torch.tensor([0])}
    with torch.no_grad():
        program = torch.export.export(step, (), inputs, strict=False)
        text = continued(program.module(), prompt_1S[0, :4].tolist(), 10)
    assert text == model.generate(prompt_1S[:, :4], 10)[0].tolist()


def continued(decode, text, max_new_tokens):
    """The prompt token by token, then greedily (transformers' own loop leaves out a place after the prompt)."""
    for position in range(len(text) + max_new_tokens - 1):
        logits = decode(input_ids=torch.tensor([[text[position]]]), cache_position=torch.tensor([position]))
        text = text if position + 1 < len(text) else [*text, int(logits[0, -1].argmax())]
    return text
