"""Facts about decoding through CUDA graphs."""

import gc
import logging

import pytest
import torch

from remoe.model import decode, generate
from remoe.model.decode import FixedDecoding, PlainDecoding
from tests.model.test_decode import MASK_BS, TOKENS_BS, every_router, logits_of, model_with

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(decode, "SHORTEST_WINDOW", 16)


def on_gpu(router, dtype=torch.float32, **settings):
    return model_with(router, **settings).to("cuda", dtype)


@every_router
def test_replayed_logits_are_those_of_ordinary_calls(router):
    model = on_gpu(router)
    text_BS, mask_BS = (torch.arange(150).view(3, 50) * 5 % 37).cuda(), MASK_BS.cuda()
    mask_BS = torch.cat((mask_BS, mask_BS.new_ones(3, 40)), dim=1)
    plain = logits_of(PlainDecoding(50), model, text_BS, mask_BS, 40)
    decoding = FixedDecoding(model, 3, 50, captures=True)
    for _ in range(2):  # the second time all graphs are there
        torch.testing.assert_close(logits_of(decoding, model, text_BS, mask_BS, 40), plain, rtol=1e-4, atol=1e-4)
    assert sorted(decoding.graphs) == [16, 32, 64]


@every_router
def test_text_through_graphs_is_that_without(router):
    model, prompt_BS, mask_BS = on_gpu(router), TOKENS_BS.cuda(), MASK_BS.cuda()
    for settings in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}, {"stop_tokens": range(0, 37, 5)}):
        texts = [
            model.generate(prompt_BS, 60, token_mask_BS=mask_BS, cuda_graphs=on, **settings)
            for on in (True, False, True)
        ]
        assert torch.equal(texts[0], texts[1])
        assert torch.equal(texts[2], texts[1])


def test_bf16_text_with_one_prompt_uses_graphs_and_is_deterministic():
    model = on_gpu("relu", torch.bfloat16)
    first = model.generate(TOKENS_BS[:1].cuda(), 60)
    assert isinstance(model.kept_decoding, FixedDecoding)
    assert set(model.kept_decoding.graphs) == {16, 32, 64, 80}
    assert torch.equal(model.generate(TOKENS_BS[:1].cuda(), 60), first)


@pytest.mark.parametrize("router", ["relu", "topk", "recurrent_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_step_and_the_choice_of_its_token_never_wait(router, dtype):
    model = on_gpu(router, dtype)
    prompt_BS = TOKENS_BS.cuda()
    sampling = generate.Sampling(temperature=0.8, top_k=20, top_p=0.9, stop_tokens=frozenset({36}))
    model.generate(prompt_BS, 60)
    assert isinstance(model.kept_decoding, FixedDecoding)
    assert model.kept_decoding.graphs  # the stream below replays them
    stream = generate.stream_tokens(model, generate.Prompt(prompt_BS), 60, sampling)
    for _ in range(8):  # the prompt is read with the first; no look at the stops before the 16th
        next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.close()


def test_memory_does_not_grow_from_text_to_text_and_goes_back_for_training():
    model = on_gpu("relu", torch.bfloat16)
    used = []
    for length in (60, 60, 50, 60, 60):
        model.generate(TOKENS_BS.cuda(), length)
        gc.collect()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(used[1:])) == 1
    model.train()
    gc.collect()
    assert torch.cuda.memory_allocated() < used[-1][0]


def test_changed_weights_are_seen_by_graphs_and_moved_ones_get_new_graphs():
    model, prompt_BS = on_gpu("relu"), TOKENS_BS.cuda()
    model.generate(prompt_BS, 40)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model.generate(prompt_BS, 40), model.generate(prompt_BS, 40, cuda_graphs=False))
    model.double().float()
    assert torch.equal(model.generate(prompt_BS, 40), model.generate(prompt_BS, 40, cuda_graphs=False))


def test_a_step_that_waits_runs_without_graphs_and_says_so_once(caplog):
    model, prompt_BS = on_gpu("relu", torch.float64), TOKENS_BS.cuda()  # fp64 has the plain path only
    with caplog.at_level(logging.WARNING, logger="remoe"):
        texts = [model.generate(prompt_BS, 40) for _ in range(2)]
    assert torch.equal(texts[0], model.generate(prompt_BS, 40, cuda_graphs=False))
    assert torch.equal(*texts)
    assert [record.message[:36] for record in caplog.records] == ["generation runs without CUDA graphs:"]


def test_a_text_while_gradients_are_off_and_inference_mode_is_on_uses_the_same_graphs():
    model, prompt_BS = on_gpu("relu"), TOKENS_BS.cuda()
    with torch.inference_mode():
        first = model.generate(prompt_BS, 40)
    kept = model.kept_decoding
    assert torch.equal(model.generate(prompt_BS, 40), first)
    assert model.kept_decoding is kept
