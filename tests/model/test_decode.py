"""Facts about the decoding step of fixed shape: it gives what ordinary calls give, wherever it runs."""

import copy
import pickle

import pytest
import torch
from torch import nn

from remoe.model import ReMoEConfig, ReMoEForCausalLM, decode, generate
from remoe.model.decode import FixedDecoding, PlainDecoding, obstacle_to_graphs, window_for
from remoe.model.generate import Prompt, Sampling, choose, stream_tokens
from remoe.moe.routers import ROUTERS

ROUTER_OPTIONS = {
    "every": [{"name": name} for name in sorted(ROUTERS)],
    "other": [
        {"name": "lory", "segment_length": 4},
        {"name": "lory", "generation": "prompt"},
        {"name": "recurrent_relu", "cell": "lstm", "residual_coef": 0.5},
        {"name": "recurrent_relu", "passing": "shuffle"},
        {"name": "hash", "table": "random", "per_layer": True},
        {"name": "topk", "warmup_steps": 3},
    ],
}
every_router = pytest.mark.parametrize(
    "router",
    [*ROUTER_OPTIONS["every"], *ROUTER_OPTIONS["other"]],
    ids=lambda router: "-".join(map(str, router.values())),
)
TOKENS_BS = torch.arange(30).view(3, 10) * 7 % 37
MASK_BS = torch.ones(3, 10, dtype=torch.bool)
MASK_BS[0, :6] = MASK_BS[2, :1] = False


def model_with(router, **settings):
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 16}
    sizes |= {"num_experts": 4, "top_k": 2, "init_std": 0.3, "vocab_size": 37}
    model = ReMoEForCausalLM(ReMoEConfig(**sizes | {"router": router} | settings), seed=0).eval().double()
    for module in model.modules():
        if hasattr(module, "thresholds"):
            module.thresholds.fill_(0.3)
    return model


@pytest.fixture
def fixed(monkeypatch):
    """Let every text be decoded by the step of fixed shape, without capturing it; windows of 4, 8, 16, ... places."""
    monkeypatch.setattr(decode, "SHORTEST_WINDOW", 4)
    made = []

    def decoding_for(model, tokens_BS, max_new_tokens, cuda_graphs):
        if cuda_graphs:
            length = tokens_BS.shape[1] + max_new_tokens
            made.append(FixedDecoding(model, len(tokens_BS), length, captures=False))
        return made[-1] if cuda_graphs else PlainDecoding(tokens_BS.shape[1] + max_new_tokens)

    monkeypatch.setattr(generate, "decoding_for", decoding_for)
    return made


@torch.no_grad()
def logits_of(decoding, model, text_BS, mask_BS, steps):
    prompt = text_BS[:, :-steps]
    logits = [decoding.begin(model, prompt, None if mask_BS is None else mask_BS[:, : prompt.shape[1]]).clone()]
    for place in range(prompt.shape[1], text_BS.shape[1] - 1):
        step_mask_B = None if mask_BS is None or place % 2 else torch.tensor([True, place < 7, True]).to(mask_BS.device)
        logits.append(decoding.step(model, text_BS[:, place], step_mask_B).clone())
    return torch.stack(logits)


@every_router
@pytest.mark.parametrize("mask_BS", [None, MASK_BS], ids=["whole", "padded"])
def test_logits_are_those_of_ordinary_calls(router, mask_BS, monkeypatch):
    monkeypatch.setattr(decode, "SHORTEST_WINDOW", 4)
    model = model_with(router)
    text_BS = torch.arange(66).view(3, 22) * 5 % 37
    plain = logits_of(PlainDecoding(22), model, text_BS, mask_BS, 13)
    step = logits_of(FixedDecoding(model, 3, 22, captures=False), model, text_BS, mask_BS, 13)
    torch.testing.assert_close(step, plain, rtol=1e-12, atol=1e-12)


@every_router
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 4}, {"stop_tokens": range(0, 37, 3)}],
    ids=["greedy", "sampled", "stops"],
)
def test_text_is_that_of_ordinary_calls(fixed, router, settings):
    model = model_with(router)
    texts = [model.generate(TOKENS_BS, 25, token_mask_BS=MASK_BS, cuda_graphs=on, **settings) for on in (True, False)]
    assert torch.equal(*texts)
    assert len(fixed) == 1


def test_each_step_reads_the_least_window_that_holds_all_tokens(fixed, monkeypatch):
    model, windows = model_with("relu"), []
    run = FixedDecoding._run
    monkeypatch.setattr(FixedDecoding, "_run", lambda self, *args: (windows.append(args[-1]), run(self, *args)))
    model.generate(TOKENS_BS[:, :3], 16)
    assert fixed[0].cache.max_length == 20
    assert windows == [4] + [8] * 4 + [16] * 8 + [20] * 2  # the last token is not read


@pytest.mark.parametrize(("length", "window"), [(1, 256), (256, 256), (257, 512), (1025, 2048)])
def test_windows_double(length, window):
    assert window_for(length) == window


@every_router
def test_a_second_text_is_not_touched_by_the_first(router):
    model = model_with(router)
    decoding = FixedDecoding(model, 3, 22, captures=False)
    text_BS = torch.arange(66).view(3, 22) * 5 % 37
    fresh = logits_of(decoding, model, text_BS, MASK_BS, 13)
    logits_of(decoding, model, text_BS.flip(1), None, 4)
    assert torch.equal(logits_of(decoding, model, text_BS, MASK_BS, 13), fresh)


def test_graphs_are_used_again_only_for_the_same_rows_room_weights_and_routers():
    model = model_with("relu")
    decoding = FixedDecoding(model, 3, 300, captures=False)
    assert decoding.serves(model, 3, 512)
    assert not decoding.serves(model, 3, 513)
    assert not decoding.serves(model, 2, 20)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert decoding.serves(model, 3, 20), "a graph reads changed weights where they lie"
    model.model.layers[1].mlp.router.top_k = 1
    assert not decoding.serves(model, 3, 20)
    model.model.layers[1].mlp.router.top_k = 2
    assert decoding.serves(model, 3, 20)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    assert not decoding.serves(model, 3, 20)


def test_a_copied_or_pickled_model_starts_without_graphs_and_a_training_one_loses_them():
    model = model_with("relu")
    model.kept_decoding = FixedDecoding(model, 3, 300, captures=False)
    assert copy.deepcopy(model).kept_decoding is None
    assert pickle.loads(pickle.dumps(model)).kept_decoding is None
    assert model.eval().kept_decoding is not None
    assert model.train().kept_decoding is None


def test_texts_that_are_streamed_at_once_do_not_mix(fixed):
    model = model_with({"name": "lory", "segment_length": 4})
    prompts = [Prompt(TOKENS_BS), Prompt(TOKENS_BS.flip(0), MASK_BS)]
    streams = [stream_tokens(model, prompt, 12, Sampling()) for prompt in prompts]
    together = [torch.stack(tokens) for tokens in zip(*(zip(*streams, strict=True)), strict=True)]
    for prompt, new_SB in zip(prompts, together, strict=True):
        alone = model.generate(prompt.tokens_BS, 12, token_mask_BS=prompt.token_mask_BS, cuda_graphs=False)
        assert torch.equal(new_SB.T, alone[:, 10:])


def test_what_is_made_under_inference_mode_serves_outside_of_it(monkeypatch):
    model, made = model_with({"name": "lory", "segment_length": 4}), []

    def decoding_for(*_):
        made.extend([] if made else [FixedDecoding(model, 3, 40, captures=False)])
        return made[0]

    monkeypatch.setattr(generate, "decoding_for", decoding_for)
    with torch.inference_mode():
        first = model.generate(TOKENS_BS, 8)
    assert torch.equal(model.generate(TOKENS_BS, 8), first)


def test_a_stream_that_is_left_puts_training_mode_back():
    model = model_with("relu").train()
    stream = stream_tokens(model, Prompt(TOKENS_BS), 12, Sampling())
    next(stream)
    assert not model.training
    stream.close()
    assert model.training
    assert torch.is_grad_enabled()


def test_sampling_draws_what_multinomial_draws():
    logits_BV = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)) * 3
    probability_BV = (logits_BV / 0.7).softmax(-1)
    expected = torch.multinomial(probability_BV, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    assert torch.equal(choose(logits_BV, Sampling(temperature=0.7), torch.Generator().manual_seed(5)), expected)


def test_only_the_logits_that_are_asked_for_are_computed():
    model = model_with("relu")
    logits = model(TOKENS_BS).logits
    torch.testing.assert_close(model(TOKENS_BS, logits_to_keep=2).logits, logits[:, -2:], rtol=1e-12, atol=1e-12)


def test_what_keeps_a_model_from_graphs_is_named(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    model = model_with("relu")
    assert obstacle_to_graphs(model, cuda) is None
    assert obstacle_to_graphs(model, cpu) == "device cpu has none"
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert obstacle_to_graphs(model, cuda) == "a hook would see no step"
    hook.remove()
    post_norm = model_with({"name": "topk"}, block="post_norm", num_kv_heads=None)
    assert "numbers of rows" in obstacle_to_graphs(post_norm, cuda)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert "autocast" in obstacle_to_graphs(model, cuda)
