"""Facts about the model on a GPU."""

import pytest
import torch

from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.size import Workload, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def loss_of(model, tokens_BS, **inputs):
    with torch.autocast("cuda", torch.bfloat16):
        return model(tokens_BS, labels_BS=tokens_BS, **inputs).losses / tokens_BS.numel()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dense_step_in_bf16_never_waits_for_the_device(build, tokens_BS, checkpointing):
    model = build(moe_layers="none").cuda().train()
    model.activation_checkpointing = checkpointing
    inputs = {
        "token_mask_BS": torch.ones_like(tokens_BS).cuda(),
        "document_BS": torch.zeros_like(tokens_BS).cuda(),
    }
    tokens_BS = tokens_BS.cuda()
    loss_of(model, tokens_BS, **inputs).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model, tokens_BS).backward()
        loss_of(model, tokens_BS, **inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("padded", [False, True])
def test_fp32_logits_and_text_agree_with_the_cpu(build, tokens_BS, padded):
    model = build()
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[0, :4] = not padded
    logits, text = model(tokens_BS, mask_BS).logits, model.generate(tokens_BS, 8, token_mask_BS=mask_BS)
    model.cuda()
    torch.testing.assert_close(model(tokens_BS.cuda(), mask_BS.cuda()).logits.cpu(), logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.generate(tokens_BS.cuda(), 8, token_mask_BS=mask_BS.cuda()).cpu(), text)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [{"moe_layers": "none"}, {"router": "topk"}, {"router": "relu"}])
def test_peak_memory_is_near_the_plan(settings, checkpointing):
    config = ReMoEConfig(
        **{"vocab_size": 8192, "hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 2048}
        | settings
    )
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        model = ReMoEForCausalLM(config)
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens_BS = torch.randint(0, 8192, (16, 1024), device="cuda")
    loss_of(model, tokens_BS[:1]).backward()
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    loss_of(model, tokens_BS).backward()
    workload = Workload(
        sequence_length=1024, micro_batch_size=16, precision="bf16", activation_checkpointing=checkpointing
    )
    expected = plan(config, workload).memory.total_at_start
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected, rel=0.2)
