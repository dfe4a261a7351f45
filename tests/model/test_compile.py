"""Facts about torch.compile, with the aot_eager backend: whole graphs, no code generation."""

import pytest
import torch
import torch.nn.functional as F


def step(model, tokens_BS, **inputs):
    logits = model(tokens_BS, **inputs).logits
    F.cross_entropy(logits.flatten(0, 1), tokens_BS.flatten()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return logits.detach(), gradients


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


QUICK = [
    ("relu", "none", False),
    ("relu", [1], True),
    ("relu", "all", False),
    ("topk", [1], False),
    ("topk", "all", True),
]
SLOW = [
    ("relu", "none", True),
    ("relu", [1], False),
    ("relu", "all", True),
    ("topk", [1], True),
    ("topk", "all", False),
]
"""The other combinations; a dense model has no router."""


@pytest.mark.parametrize(
    ("router", "moe_layers", "checkpointing"),
    [*QUICK, *(pytest.param(*values, marks=pytest.mark.slow) for values in SLOW)],
)
def test_a_step_is_one_graph_with_equal_logits_and_gradients(build, tokens_BS, router, moe_layers, checkpointing):
    model = build(router=router, moe_layers=moe_layers).train()
    model.activation_checkpointing = checkpointing
    logits, gradients = step(model, tokens_BS)
    model.compile(fullgraph=True, backend="aot_eager")
    compiled_logits, compiled_gradients = step(model, tokens_BS)
    torch.testing.assert_close(compiled_logits, logits, rtol=0, atol=1e-6)
    assert gradients.keys() == compiled_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=0, atol=1e-6)


def test_masks_and_documents_stay_in_the_graph(build, tokens_BS):
    model = build(moe_layers="all")
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[0, :3] = False
    inputs = {"token_mask_BS": mask_BS, "document_BS": torch.tensor([[0] * 5 + [1] * 6] * 2)}
    logits, _ = step(model, tokens_BS, **inputs)
    model.compile(fullgraph=True, backend="aot_eager")
    compiled_logits, _ = step(model, tokens_BS, **inputs)
    torch.testing.assert_close(compiled_logits, logits, rtol=0, atol=1e-6)
