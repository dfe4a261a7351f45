"""Facts about the optimizer."""

import torch
from torch import nn

from remoe.training.config import OptimizerConfig
from remoe.training.optimizer import build_optimizer, optimizer_step, optimizer_tensors


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 3), nn.RMSNorm(3), nn.Linear(3, 2))


def state_of(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    return optimizer_tensors(dict(model.named_parameters()), optimizer)


def set_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_matrices_and_embeddings_decay_and_norms_and_biases_do_not():
    model = small_model()
    groups = build_optimizer(model.parameters(), OptimizerConfig(weight_decay=0.3)).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert [decay[id(parameter)] for parameter in model.parameters()] == [0.3, 0.0, 0.3, 0.0]


def test_a_skipped_step_changes_neither_weights_nor_state():
    model = small_model()
    optimizer = build_optimizer(model.parameters(), OptimizerConfig())
    set_gradients(model, 0.1)
    optimizer_step(optimizer, 0.1, torch.tensor(False))
    before = [value.clone() for value in (*model.parameters(), *state_of(model, optimizer).values())]
    set_gradients(model, float("nan"))
    optimizer_step(optimizer, 0.1, torch.tensor(True))
    after = [*model.parameters(), *state_of(model, optimizer).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_steps_after_a_skipped_one_are_as_if_it_had_not_been():
    results = []
    for gradients in ((0.1, 0.2), (0.1, float("inf"), 0.2)):
        model = small_model()
        optimizer = build_optimizer(model.parameters(), OptimizerConfig())
        for gradient in gradients:
            set_gradients(model, gradient)
            optimizer_step(optimizer, 0.1, ~torch.tensor(gradient).isfinite())
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_is_named_after_parameters_and_complete_before_the_first_step():
    model = small_model()
    names = set(state_of(model, build_optimizer(model.parameters(), OptimizerConfig())))
    expected = {f"{name}.{key}" for name, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    assert names == expected


def test_state_made_ahead_gives_the_same_steps_as_state_made_by_torch():
    model, other = small_model(), small_model()
    config = OptimizerConfig(weight_decay=0.0)
    ours = build_optimizer(model.parameters(), config)
    theirs = torch.optim.AdamW(
        other.parameters(), lr=0.1, betas=(config.beta1, config.beta2), weight_decay=0.0, fused=True
    )
    for gradient in (0.3, -0.2, 0.5):
        set_gradients(model, gradient)
        set_gradients(other, gradient)
        optimizer_step(ours, 0.1, torch.tensor(False))
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
