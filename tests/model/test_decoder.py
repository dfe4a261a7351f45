"""Facts about the whole model."""

import pytest
import torch
import torch.nn.functional as F

from remoe.errors import ConfigError
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.placement import place_tokens
from remoe.moe import RouterContext, Routing

EVERY_ROUTER = pytest.mark.parametrize("router", ["relu", "topk"])


def loss_of(model, tokens_BS):
    logits = model(tokens_BS).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())


def test_parameters_are_named_as_in_transformers(build):
    names = {name: list(parameter.shape) for name, parameter in build().named_parameters()}
    attention = {"q_proj": [32, 32], "k_proj": [16, 32], "v_proj": [16, 32], "o_proj": [32, 32]}
    expected = {"model.embed_tokens.weight": [61, 32], "model.norm.weight": [32], "lm_head.weight": [61, 32]}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        expected |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        expected |= {f"{prefix}.{name}.weight": [32] for name in ("input_layernorm", "post_attention_layernorm")}
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp"
        expected |= {f"{prefix}.router.weight": [4, 32]}
        expected |= {f"{prefix}.experts.gate_up_proj": [4, 96, 32], f"{prefix}.experts.down_proj": [4, 32, 48]}
    expected |= {f"model.layers.1.mlp.{name}_proj.weight": [48, 32] for name in ("gate", "up")}
    expected |= {"model.layers.1.mlp.down_proj.weight": [32, 48]}
    assert names == expected


def test_the_output_has_logits_and_a_routing_for_each_moe_layer(build, tokens_BS):
    logits, routings = build()(tokens_BS)
    assert logits.shape == (2, 11, 61)
    assert routings[1] is None
    assert [routing.weights_TE.shape for routing in (routings[0], routings[2])] == [(22, 4), (22, 4)]


@EVERY_ROUTER
def test_a_later_token_changes_no_earlier_logit(build, tokens_BS, router):
    model = build(router=router)
    changed_BS = tokens_BS.clone()
    changed_BS[:, 6] = (changed_BS[:, 6] + 1) % 61
    before, after = model(tokens_BS).logits, model(changed_BS).logits
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-5)
    assert (before[:, 6:] - after[:, 6:]).abs().amin(-1).max() > 1e-3


@EVERY_ROUTER
def test_a_packed_document_is_computed_as_if_alone(build, tokens_BS, router):
    model = build(router=router)
    document_BS = torch.tensor([[3] * 4 + [1] * 7, [0] * 6 + [1] * 5])
    packed = model(tokens_BS, document_BS=document_BS)
    for row, cut in enumerate((4, 6)):
        for part in (slice(0, cut), slice(cut, None)):
            alone = model(tokens_BS[row : row + 1, part]).logits[0]
            torch.testing.assert_close(packed.logits[row, part], alone, rtol=0, atol=1e-5)


@EVERY_ROUTER
def test_left_padding_changes_nothing_and_is_not_routed(build, tokens_BS, router):
    model = build(router=router)
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[0, :5] = False
    logits, routings = model(tokens_BS, mask_BS)
    alone = model(tokens_BS[:1, 5:])
    torch.testing.assert_close(logits[:1, 5:], alone.logits, rtol=0, atol=1e-5)
    assert torch.isfinite(logits).all()
    for routing, routing_alone in zip((routings[0], routings[2]), (alone.routings[0], alone.routings[2]), strict=True):
        assert torch.equal(routing.token_mask_T, mask_BS.flatten())
        assert not routing.routing_map_TE[:5].any()
        assert torch.equal(routing.routing_map_TE[5:11], routing_alone.routing_map_TE)


def test_a_row_without_any_token_gives_finite_values_and_gradients(build, tokens_BS):
    model = build()
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[1] = 0
    logits = model(tokens_BS, mask_BS).logits
    logits[0].square().sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_a_mask_of_ones_and_one_document_a_row_equal_the_plain_call(build, tokens_BS):
    model = build()
    plain = model(tokens_BS).logits
    ones_BS = torch.ones_like(tokens_BS)
    torch.testing.assert_close(model(tokens_BS, ones_BS).logits, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(tokens_BS, document_BS=ones_BS).logits, plain, rtol=0, atol=1e-5)


def test_tied_embeddings_are_one_parameter_with_both_gradients(build, tokens_BS):
    model = build(tie_embeddings=True)
    assert "lm_head.weight" not in model.state_dict()
    table = model.model.embed_tokens.weight
    hidden_BSH, _ = model.model(tokens_BS, place_tokens(tokens_BS, None, None, None), None)
    torch.testing.assert_close(model(tokens_BS).logits, hidden_BSH @ table.T, rtol=0, atol=1e-5)
    loss_of(model, tokens_BS).backward()
    unread = torch.ones(61, dtype=torch.bool)
    unread[tokens_BS.flatten()] = False
    assert (table.grad[unread] != 0).any(), "rows that no token looked up get the output head's gradient"


@pytest.mark.parametrize("moe_layers", ["all", "none", [1]])
def test_every_parameter_gets_a_gradient(build, tokens_BS, moe_layers):
    model = build(moe_layers=moe_layers).train()
    loss_of(model, tokens_BS).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_layers_are_read_from_the_config(build):
    kinds = {
        str(moe_layers): [type(layer.mlp).__name__ for layer in build(moe_layers=moe_layers).model.layers]
        for moe_layers in ("all", "none", [1])
    }
    assert kinds == {"all": ["MoE"] * 3, "none": ["DenseMLP"] * 3, "[1]": ["DenseMLP", "MoE", "DenseMLP"]}


class CountingMLP(torch.nn.Module):
    """Stands in for an MoE layer with a recurrent router: hands on the state it was given, plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[RouterContext] = []

    def forward(self, hidden_BSH, context):
        self.seen.append(context)
        hidden_TH = hidden_BSH.flatten(0, 1)
        state_TP = torch.zeros(len(hidden_TH), 2) if context.state_TP is None else context.state_TP
        weights_TE = hidden_TH[:, :4]
        return hidden_BSH + state_TP.sum(), Routing(weights_TE, weights_TE > 0, state_TP=state_TP + 1)


def with_counting_layers(model, layers):
    stubs = {layer: CountingMLP() for layer in layers}
    for layer, stub in stubs.items():
        model.model.layers[layer].mlp = stub
    return stubs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_state_passes_from_moe_layer_to_moe_layer_over_dense_ones(build, tokens_BS, checkpointing):
    model = build()
    model.activation_checkpointing = checkpointing
    stubs = with_counting_layers(model, (0, 2))
    _, routings = model(tokens_BS)
    first, last = stubs[0].seen[0], stubs[2].seen[0]
    assert first.state_TP is None
    assert last.state_TP.tolist() == [[1.0, 1.0]] * 22
    assert routings[2].state_TP.tolist() == [[2.0, 2.0]] * 22


def test_routers_are_told_tokens_starts_mask_and_layer(build, tokens_BS):
    model = build()
    stubs = with_counting_layers(model, (0, 2))
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[1, :3] = False
    model(tokens_BS, mask_BS)
    context = stubs[2].seen[0]
    assert context.layer_index == 2
    assert torch.equal(context.token_ids_T, tokens_BS.flatten())
    assert torch.equal(context.token_mask_T, mask_BS.flatten())
    assert context.sequence_start_T.nonzero().flatten().tolist() == [0, 14]


def test_activation_checkpointing_changes_no_bit_and_counts_once(build, tokens_BS):
    results = {}
    for on in (False, True):
        model = build(moe_layers="all").train()
        model.activation_checkpointing = on
        logits, routings = model(tokens_BS)
        penalty = sum(routing.weights_TE.mean() for routing in routings)
        (F.cross_entropy(logits.flatten(0, 1), tokens_BS.flatten()) + 0.1 * penalty).backward()
        results[on] = (logits, [p.grad for p in model.parameters()], [r.routing_map_TE for r in routings])
    assert torch.equal(results[False][0], results[True][0])
    for off, on in zip(results[False][1] + results[False][2], results[True][1] + results[True][2], strict=True):
        assert torch.equal(off, on)


def test_activation_checkpointing_keeps_less(build):
    tokens_BS = torch.zeros(4, 64, dtype=torch.int64)

    def kept_bytes(on):
        model = build(num_layers=6, moe_layers="all").train()
        model.activation_checkpointing = on
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens_BS)
        return sum(size for size, _ in storages.values())

    assert kept_bytes(True) < 0.3 * kept_bytes(False)


def test_autocast_computes_in_bf16_and_routes_in_fp32(build, tokens_BS):
    model = build()
    exact = model(tokens_BS)
    with torch.autocast("cpu", torch.bfloat16):
        logits, routings = model(tokens_BS)
    assert logits.dtype == torch.bfloat16
    assert routings[0].logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits.float(), exact.logits, rtol=0.1, atol=0.15)


def test_a_bf16_model_runs_and_routes_in_fp32(build, tokens_BS):
    logits, routings = build().bfloat16()(tokens_BS)
    assert logits.dtype == torch.bfloat16
    assert routings[0].weights_TE.dtype == torch.float32


def test_a_model_on_the_meta_device_has_shapes_and_takes_no_memory(build):
    with torch.device("meta"):
        model = build(hidden_size=4096, num_layers=8, moe_layers="all", intermediate_size=8192)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 3e9


def test_a_config_without_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"model\.vocab_size is null"):
        ReMoEForCausalLM(ReMoEConfig())
