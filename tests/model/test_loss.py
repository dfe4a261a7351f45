"""Facts about the losses that the model returns when it is given labels."""

import pytest
import torch
import torch.nn.functional as F

from remoe.model.loss import Head


@pytest.fixture
def labels_BS(tokens_BS):
    labels_BS = tokens_BS.roll(-1, dims=1)
    labels_BS[:, -1] = -100
    return labels_BS


@pytest.fixture(params=["all at once", "in chunks"])
def way(request, monkeypatch):
    """How the losses are computed: as on a CPU, or as on a GPU."""
    if request.param == "in chunks":
        monkeypatch.setattr(Head, "losses", Head.chunked_losses)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"block": "post_norm", "num_kv_heads": 4}], ids=str)
def test_their_sum_and_its_gradients_are_those_of_the_logits(build, tokens_BS, labels_BS, settings, precision):
    results = []
    for with_labels in (False, True):
        model = build(**settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(tokens_BS, labels_BS=labels_BS) if with_labels else model(tokens_BS)
        if not with_labels:
            logits_TV = output.logits.flatten(0, 1).float()
            total = F.cross_entropy(logits_TV, labels_BS.flatten(), reduction="sum")
        else:
            total = output.losses
        total.backward()
        results.append([total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.02, "atol": 0.02}
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, **tolerance)


@pytest.mark.usefixtures("way")
def test_each_places_loss_is_its_cross_entropy_and_0_without_a_label(build, tokens_BS, labels_BS):
    model = build()
    with torch.no_grad():
        losses_BS = model(tokens_BS, labels_BS=labels_BS, reduction="none").losses
        logits_BSV = model(tokens_BS).logits
    expected_BS = F.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, reduction="none")
    torch.testing.assert_close(losses_BS, expected_BS)
    assert losses_BS[:, -1].tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("way")
def test_losses_stay_in_the_graph(build, tokens_BS, labels_BS):
    torch.compiler.reset()
    model = build(moe_layers="all").train()
    model(tokens_BS, labels_BS=labels_BS).losses.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.compile(fullgraph=True, backend="aot_eager")
    model(tokens_BS, labels_BS=labels_BS).losses.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)
    torch.compiler.reset()
