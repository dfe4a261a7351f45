"""Facts about what is kept for the backward pass."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from remoe.errors import ConfigError
from remoe.model.recompute import recomputation


class Counting(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.calls[str(operation)] = self.calls.get(str(operation), 0) + 1
        return operation(*arguments, **options or {})


def calls_of_a_step(build, tokens_BS, mode: str) -> dict[str, int]:
    model = build(moe_layers="all").train()
    model.activation_checkpointing = mode
    with Counting() as counting:
        model(tokens_BS, labels_BS=tokens_BS).losses.backward()
    return counting.calls


def test_selective_runs_experts_once_and_attention_twice(build, tokens_BS):
    calls = {mode: calls_of_a_step(build, tokens_BS, mode) for mode in ("none", "full", "selective")}
    experts = {mode: counted["remoe.expert_mlp.default"] for mode, counted in calls.items()}
    lists = {mode: counted["remoe.dispatch_lists.default"] for mode, counted in calls.items()}
    assert experts == lists == {"none": 3, "full": 6, "selective": 3}
    products = {mode: counted["aten.mm.default"] for mode, counted in calls.items()}
    assert products["none"] < products["selective"] == products["full"]


def test_true_is_full_and_another_word_is_a_clear_error(build):
    model = build()
    assert model.activation_checkpointing == "none"
    model.activation_checkpointing = True
    assert model.activation_checkpointing == "full"
    with pytest.raises(ConfigError, match=r"activation_checkpointing is 'some', must be one of none, full, selective"):
        model.activation_checkpointing = "some"
    assert recomputation("key", False) == "none"


@pytest.mark.parametrize(("settings", "draws"), [({}, False), ({"router": "sparsemixer"}, True)], ids=str)
def test_random_state_is_kept_only_for_layers_that_draw(build, settings, draws):
    assert build(**settings).model.draws is draws
