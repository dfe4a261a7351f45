"""Facts about generation."""

import pytest
import torch

from remoe.errors import ConfigError
from remoe.model import KVCache
from remoe.model.generate import Sampling, choose

EVERY_ROUTER = pytest.mark.parametrize("router", ["relu", "topk"])


def without_cache(model, tokens_BS, max_new_tokens):
    for _ in range(max_new_tokens):
        chosen_B = model(tokens_BS).logits[:, -1].argmax(-1)
        tokens_BS = torch.cat((tokens_BS, chosen_B[:, None]), dim=1)
    return tokens_BS


@EVERY_ROUTER
def test_cached_and_uncached_generation_agree_token_for_token(build, tokens_BS, router):
    model = build(router=router)
    assert torch.equal(model.generate(tokens_BS, 20), without_cache(model, tokens_BS, 20))


def test_a_prompt_of_one_token_is_enough(build, tokens_BS):
    model = build()
    prompt_BS = tokens_BS[:, :1]
    assert torch.equal(model.generate(prompt_BS, 12), without_cache(model, prompt_BS, 12))


@EVERY_ROUTER
def test_a_left_padded_batch_equals_each_prompt_alone(build, tokens_BS, router):
    model = build(router=router)
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[0, :7] = False
    together = model.generate(tokens_BS, 15, token_mask_BS=mask_BS)
    assert torch.equal(together[:1, 7:], model.generate(tokens_BS[:1, 7:], 15))
    assert torch.equal(together[1:], model.generate(tokens_BS[1:], 15))


def test_no_new_tokens_give_the_prompt_back(build, tokens_BS):
    assert torch.equal(build().generate(tokens_BS, 0), tokens_BS)


def test_a_prompt_read_in_pieces_gives_the_logits_of_the_whole(build, tokens_BS):
    model, cache = build(), KVCache(11)
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[0, :2] = False
    whole = model(tokens_BS, mask_BS).logits
    pieces = [
        model(tokens_BS[:, part], mask_BS[:, part], cache=cache).logits
        for part in (slice(0, 4), slice(4, 5), slice(5, 11))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("as_set", [False, True])
def test_a_row_ends_with_its_stop_token_while_others_go_on(build, tokens_BS, as_set):
    model = build()
    free = model.generate(tokens_BS, 12)
    new_tokens = free[:, 11:].tolist()
    stop_at = next(place for place, token in enumerate(new_tokens[0]) if token not in new_tokens[1] and place < 11)
    stop_token = new_tokens[0][stop_at]
    out = model.generate(tokens_BS, 12, stop_tokens={stop_token} if as_set else stop_token)
    assert torch.equal(out[1], free[1]), "the other row is not disturbed"
    assert out[0, 11:].tolist() == new_tokens[0][: stop_at + 1] + [stop_token] * (11 - stop_at)


def test_generation_ends_once_every_row_has_stopped(build, tokens_BS):
    model = build()
    first_B = model.generate(tokens_BS, 1)[:, -1]
    out = model.generate(tokens_BS, 500, stop_tokens=set(first_B.tolist()))
    assert out.shape == (2, 12)


def test_sampling_repeats_with_the_seed_and_differs_with_another(build, tokens_BS):
    model = build()
    first, again, other = (model.generate(tokens_BS, 30, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_leaves_the_global_generator_alone(build, tokens_BS):
    model = build()
    state = torch.get_rng_state()
    model.generate(tokens_BS, 5, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_one_and_a_tiny_top_p_are_greedy(build, tokens_BS):
    model = build()
    greedy = model.generate(tokens_BS, 10)
    assert torch.equal(model.generate(tokens_BS, 10, temperature=2.0, top_k=1), greedy)
    assert torch.equal(model.generate(tokens_BS, 10, temperature=2.0, top_p=1e-6), greedy)


def draws(**settings):
    logits_BV = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    chosen_B = choose(logits_BV, Sampling(**settings), torch.Generator().manual_seed(0))
    return (torch.bincount(chosen_B, minlength=4) / 4000).tolist()


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
    ],
)
def test_tokens_are_drawn_in_proportion_to_what_the_filters_leave(settings, shares):
    assert draws(**settings) == pytest.approx(shares, abs=0.03)
    assert [share == 0 for share in draws(**settings)] == [share == 0 for share in shares]


def test_generation_restores_training_mode_and_takes_no_gradient(build, tokens_BS):
    model = build().train()
    assert not model.generate(tokens_BS, 2).requires_grad
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1, must be at least 0"),
        ({"temperature": -0.5}, r"temperature is -0\.5, must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan, must be at least 0"),
        ({"top_k": 0}, "top_k is 0, must be at least 1"),
        ({"top_k": 62}, "top_k is 62, must be between 1 and 61"),
        ({"top_p": 0.0}, r"top_p is 0\.0, must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p is 1\.5, must be above 0 and at most 1"),
        ({"stop_tokens": 61}, "stop_tokens is 61, must be between 0 and 60"),
        ({"tokens_BS": torch.tensor([[3, 61]])}, "a prompt token is 61, must be between 0 and 60"),
        ({"tokens_BS": torch.tensor([[-1, 99]])}, "a prompt token is -1, must be between 0 and 60"),
        ({"tokens_BS": torch.zeros(1, 0, dtype=torch.int64)}, r"the prompt has shape \[1, 0\]"),
        ({"token_mask_BS": torch.tensor([[1, 0]])}, "pad prompts on the left"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        build().generate(**{"tokens_BS": torch.tensor([[1, 2]]), "max_new_tokens": 3} | settings)
