"""RMoE's character model: its attention slot by slot, its block by hand, and everything the other model can do."""

import math

import pytest
import torch
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.model import KVCache, ReMoEConfig, ReMoEForCausalLM
from remoe.model.placement import place_tokens
from remoe.model.relative_attention import skew, unskew
from remoe.model.weights import load_model, save_model

SMALL = {
    "block": "post_norm", "vocab_size": 61, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "num_kv_heads": None,
    "intermediate_size": 12, "num_experts": 4, "top_k": 2, "attention_span": 5, "init_std": 0.5,
    "router": {"name": "topk", "renormalize": True},
}  # fmt: skip


def build(seed=0, **settings):
    return ReMoEForCausalLM(ReMoEConfig(**SMALL | settings), seed=seed).eval().double()


def attention_by_hand(layer, hidden_BSH, keys_DW):
    """One slot at a time: W keys and values before each token, 0 where the text had not begun."""
    heads = [
        projection(hidden_BSH).unflatten(-1, (2, -1)).transpose(1, 2)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    query, key, value = heads
    span, mixed = keys_DW.shape[1], torch.zeros_like(query)
    for i in range(query.shape[2]):
        places = [i - span + w for w in range(span)]
        slots = [
            [x[:, :, place] if place >= 0 else torch.zeros_like(x[:, :, 0]) for place in places] for x in (key, value)
        ]
        keys, values = (torch.stack(slot, dim=2) for slot in slots)
        scores = (keys @ query[:, :, i, :, None])[..., 0] + query[:, :, i] @ keys_DW
        share = (scores / math.sqrt(query.shape[-1])).softmax(-1)
        mixed[:, :, i] = (share[:, :, None] @ values)[:, :, 0]
    return layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))


def test_model_is_the_spec_computed_by_hand(tokens_BS):
    model = build(moe_layers=[0, 2])
    hidden = model.model.embed_tokens(tokens_BS)
    for layer in model.model.layers:
        a = F.layer_norm(hidden + attention_by_hand(layer, hidden, model.model.positions.keys), (16,))
        out, _ = layer.mlp(a)
        hidden = F.layer_norm(a + out, (16,))
        if layer.inner_norm is not None:
            hidden = F.layer_norm(a + hidden, (16,))
    expected = F.linear(hidden, model.lm_head.weight, model.lm_head.bias)
    output = model(tokens_BS)
    torch.testing.assert_close(output.logits, expected, rtol=1e-10, atol=1e-10)
    assert [routing is None for routing in output.routings] == [False, True, False]


def test_unskew_keeps_each_rows_own_window_and_skew_puts_it_back():
    scores = torch.arange(3 * 6.0).view(1, 3, 6)
    windows = unskew(scores)
    assert windows[0].tolist() == [[0, 1, 2, 3], [7, 8, 9, 10], [14, 15, 16, 17]]
    assert torch.equal(unskew(skew(windows)), windows)
    assert skew(windows)[0, 2].tolist() == [0, 0, 14, 15, 16, 17]


def test_first_token_attends_to_nothing_and_no_token_to_itself(tokens_BS):
    model = build(num_layers=1)
    attention = model.model.layers[0].self_attn
    inputs = model.model.positions(place_tokens(tokens_BS, None, None, None), None)
    hidden = torch.randn(2, 11, 16, dtype=torch.float64, requires_grad=True)
    out = attention(hidden, inputs)
    assert not out[:, 0].any()
    gradient = torch.autograd.grad(out[0, 7].sum(), hidden)[0]
    seen = gradient[0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]  # 7 through its query only, 2 to 6 are the span


def test_tokens_beyond_the_span_change_nothing_in_one_layer(tokens_BS):
    model = build(num_layers=1)
    other = tokens_BS.clone()
    other[:, :4] = (other[:, :4] + 1) % 61
    torch.testing.assert_close(model(tokens_BS).logits[:, 9:], model(other).logits[:, 9:], rtol=1e-12, atol=1e-12)
    assert not model(tokens_BS).logits[:, 8].allclose(model(other).logits[:, 8])


def test_cached_decoding_gives_the_logits_of_one_pass(tokens_BS):
    model = build()
    cache = KVCache(11)
    pieces = [model(part, cache=cache).logits for part in tokens_BS.split([4, 1, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens_BS).logits, rtol=1e-10, atol=1e-10)


def test_padding_on_the_left_changes_nothing(tokens_BS):
    model = build()
    padded = F.pad(tokens_BS, (3, 0), value=7)
    mask = F.pad(torch.ones_like(tokens_BS, dtype=torch.bool), (3, 0))
    torch.testing.assert_close(model(padded, mask).logits[:, 3:], model(tokens_BS).logits, rtol=1e-10, atol=1e-10)


def test_packed_documents_are_as_alone(tokens_BS):
    model = build()
    document_BS = (torch.arange(11) >= 6).long().expand(2, 11)
    packed = model(tokens_BS, document_BS=document_BS).logits
    alone = [model(part).logits for part in tokens_BS.split([6, 5], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


def test_generation_continues_with_the_likeliest_token(tokens_BS):
    model = build()
    out = model.generate(tokens_BS, 4)
    for place in range(11, 15):
        assert torch.equal(model(out[:, :place]).logits[:, -1].argmax(-1), out[:, place])


def test_activation_checkpointing_gives_the_same_gradients_with_dropout_on(tokens_BS):
    gradients = []
    for recomputes in (False, True):
        model = build(dropout=0.2).train()
        model.activation_checkpointing = recomputes
        torch.manual_seed(3)
        model(tokens_BS).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(gradients[0][name].allclose(gradients[1][name], rtol=1e-10) for name in gradients[0])
    unused = build().state_dict().keys() - gradients[0].keys()
    assert unused == {f"model.layers.{n}.dense_norm.{part}" for n in range(3) for part in ("weight", "bias")}


def test_dropout_acts_in_training_only(tokens_BS):
    model = build(dropout=0.2)
    assert torch.equal(model(tokens_BS).logits, model(tokens_BS).logits)
    model.train()
    assert not torch.equal(model(tokens_BS).logits, model(tokens_BS).logits)


def test_compiled_model_is_one_graph(tokens_BS):
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens_BS).logits, model(tokens_BS).logits, rtol=1e-10, atol=1e-10)


def test_saved_model_comes_back_bit_for_bit(tokens_BS, tmp_path):
    model = build()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tokens_BS).logits, model(tokens_BS).logits)


def test_values_start_as_in_the_base():
    model = ReMoEForCausalLM(ReMoEConfig(**SMALL | {"hidden_size": 64, "moe_layers": [0]}))
    bound = 64**-0.5
    for name in ("lm_head.weight", "lm_head.bias", "model.layers.0.self_attn.o_proj.weight"):
        assert bound * 0.8 < dict(model.named_parameters())[name].abs().max() <= bound
    for name in ("model.embed_tokens.weight", "model.positions.keys"):
        assert dict(model.named_parameters())[name].std().item() == pytest.approx(1, rel=0.1)
    for name, value in model.named_parameters():
        if "_norm." in name:
            assert value.eq(1.0 if name.endswith("weight") else 0.0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": "postnorm"}, r"model.block is 'postnorm', must be one of pre_norm, post_norm"),
        ({"num_kv_heads": 1}, r"num_kv_heads is 1, must be null"),
        ({"tie_embeddings": True}, r"tie_embeddings is true, must be false"),
        ({"attention_span": 0}, r"attention_span is 0, must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0, must be at least 0 and below 1"),
        ({"block": "pre_norm", "dropout": 0.1}, r"dropout is 0.1, must be 0 with model.block pre_norm"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReMoEConfig(**SMALL | settings)
