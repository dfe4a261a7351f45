"""The worked pass through a layer (TV7) from its logits on, and all of it in float32."""

import pytest
import torch

from remoe import losses
from tests.moe.test_layer import worked_layer

F64 = torch.float64
X = torch.tensor([[[1, 0.5], [-0.5, 1], [0.25, -1], [-1, -0.75]]], dtype=F64)
C = torch.tensor([[1, -0.5], [0.25, 0.75], [-1, 0.5], [0.5, 0.5]], dtype=F64)
D_ROUTER = [
    [0.0408306160805, 0.0204153080402], [0.0977637093942, -0.0883376743289], [-0.0130962010421, -0.0178082519249],
]  # fmt: skip
BOTH = pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 1e-5)])


@BOTH
def test_worked_gates_loads_and_penalty(dtype, tolerance):
    _, routing = worked_layer().to(dtype)(X.to(dtype))
    expected = torch.tensor([[0.7, 0.1, 0.3], [0, 0.95, 0], [0, 0, 0.525], [0, 0, 0]], dtype=dtype)
    torch.testing.assert_close(routing.weights_TE, expected, rtol=0, atol=tolerance)
    assert (losses.expert_loads(routing) * 3).tolist() == pytest.approx([0.75, 1.5, 1.5], abs=tolerance)
    assert 1 - routing.routing_map_TE.double().mean().item() == pytest.approx(0.5833333333333333, abs=1e-12)
    assert losses.sparsity_l1(routing, 1).item() == pytest.approx(0.834375, abs=tolerance)


@BOTH
def test_worked_gradients_of_logits_and_router_with_and_without_the_penalty(dtype, tolerance):
    layer = worked_layer().to(dtype)
    out, routing = layer(X.to(dtype))
    lm_loss = (C.to(dtype) * out[0]).sum()
    total = lm_loss + 0.05 * losses.sparsity_l1(routing, 1)
    assert (lm_loss.item(), total.item()) == pytest.approx((-0.112561370776126, -0.0708426207761259), abs=tolerance)
    d_logits, d_router = torch.autograd.grad(total, [routing.logits_TE, layer.router.weight], retain_graph=True)
    (of_lm_loss,) = torch.autograd.grad(lm_loss, layer.router.weight)
    close(d_logits, [[0.0408306160805, 0.0428758977838, -0.0155984569096], [0, -0.109775623221, 0],
                     [0, 0, 0.0100090234701], [0, 0, 0]], tolerance)  # fmt: skip
    close(d_router, D_ROUTER, tolerance)
    close(of_lm_loss, [[0.0314556160805, 0.0157278080402], [0.0883887093942, -0.116462674329],
                       [-0.0365337010421, -0.00843325192492]], tolerance)  # fmt: skip


def test_every_other_worked_gradient_holds_in_float32_too():
    x = X.clone().requires_grad_()
    exact, single = worked_layer(), worked_layer().float()
    gradients = []
    for layer, inputs in ((exact, x), (single, x.detach().float().requires_grad_())):
        out, routing = layer(inputs)
        loss = (C.to(out.dtype) * out[0]).sum() + 0.05 * losses.sparsity_l1(routing, 1)
        gradients.append(torch.autograd.grad(loss, [inputs, *layer.parameters()]))
    for double, rounded in zip(*gradients, strict=True):
        torch.testing.assert_close(rounded.double(), double, rtol=0, atol=1e-5)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)
