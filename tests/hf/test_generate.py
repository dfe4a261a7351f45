"""generate() of transformers gives the tokens of the native model's."""

import itertools

import pytest
import torch

from remoe import hf

pytestmark = pytest.mark.heavy

ROUTERS = {
    "relu": {},
    "relu, dialled": {"thresholds": [0.1, 0.3]},
    "topk": {"router": "topk", "top_k": 2},
    "rmoe": {"router": "rmoe"},
    "recurrent_relu": {"router": "recurrent_relu", "moe_layers": "all"},
}
each_router = pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS.keys())


def generate(model, tokens_BS, **settings):
    settings = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0} | settings
    return hf.from_native(model).generate(tokens_BS, **settings)


@each_router
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_tokens_are_the_native_ones_with_and_without_a_cache(build, tokens_BS, settings, cache):
    model = build(**settings)
    mask_BS = torch.ones_like(tokens_BS)
    generated = generate(model, tokens_BS, attention_mask=mask_BS, **cache)
    assert generated.equal(model.generate(tokens_BS, 16))


@each_router
def test_a_batch_padded_on_the_left_gives_each_rows_own_tokens(build, tokens_BS, settings):
    model = build(**settings)
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[0, :6] = 0
    generated = generate(model, tokens_BS, attention_mask=mask_BS)
    assert generated.equal(model.generate(tokens_BS, 16, token_mask_BS=mask_BS.bool()))
    assert generated[:1, 6:].equal(generate(model, tokens_BS[:1, 6:], attention_mask=mask_BS[:1, 6:]))


@each_router
def test_rows_end_with_the_stop_token_and_are_filled_up_with_it(build, tokens_BS, settings):
    model = build(**settings)
    stop = int(model.generate(tokens_BS, 4)[0, -1])
    mask_BS = torch.ones_like(tokens_BS)
    generated = generate(model, tokens_BS, attention_mask=mask_BS, eos_token_id=stop, pad_token_id=stop)
    assert generated.equal(model.generate(tokens_BS, 16, stop_tokens=stop))


@each_router
@pytest.mark.parametrize("limits", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}])
def test_the_same_seed_draws_the_same_tokens(build, tokens_BS, settings, limits):
    model = build(**settings)
    torch.manual_seed(11)
    generated = generate(
        model, tokens_BS, attention_mask=torch.ones_like(tokens_BS), do_sample=True, temperature=0.8,
        **{"top_k": 0} | limits,
    )  # fmt: skip
    assert generated.equal(model.generate(tokens_BS, 16, temperature=0.8, seed=11, **limits))


@each_router
@torch.no_grad()
def test_beams_wide_enough_for_all_texts_find_the_likeliest_by_native_logits(build, settings):
    model = build(vocab_size=5, **settings)
    prompt_1S = torch.tensor([[1, 3, 0, 2]])
    endings_BN = torch.tensor(list(itertools.product(range(5), repeat=3)))
    texts_BS = torch.cat((prompt_1S.expand(len(endings_BN), -1), endings_BN), dim=1)
    log_probs_BSV = model(texts_BS).logits.log_softmax(-1)[:, 3:-1]
    best = log_probs_BSV.gather(2, endings_BN[..., None]).sum((1, 2)).argmax()
    settings = {"num_beams": 25, "max_new_tokens": 3, "attention_mask": torch.ones_like(prompt_1S)}
    assert generate(model, prompt_1S, **settings)[0].equal(texts_BS[best])
    assert generate(model, prompt_1S, use_cache=False, **settings)[0].equal(texts_BS[best])


def test_a_capped_number_of_experts_is_honoured_while_generating(build, tokens_BS):
    config = hf.from_native(build(moe_layers="all")).config
    config.max_active_experts = 1
    capped = hf.ReMoEForCausalLM(config).eval()
    capped.load_state_dict(build(moe_layers="all").state_dict())
    seen = []
    for layer in capped.model.layers:
        layer.mlp.router.register_forward_hook(lambda router, inputs, routing: seen.append(routing.top_k_weights))
    capped.generate(tokens_BS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(tokens_BS))
    assert {weights_TK.shape[1] for weights_TK in seen} == {1}
