"""Facts about remoe::linear_cross_entropy: against logits and cross-entropy written out."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from remoe.kernels import linear_cross_entropy as op
from remoe.kernels.linear_cross_entropy import Chunks, linear_cross_entropy, rows_at_a_time


def inputs(tokens: int = 11, hidden: int = 8, vocabulary: int = 37, bias: bool = True, dtype=torch.float64):
    """Hidden states, head and labels, of which a third are missing."""
    draw = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn(tokens, hidden, generator=draw, dtype=torch.float64)
    weight_VH = torch.randn(vocabulary, hidden, generator=draw, dtype=torch.float64)
    bias_V = torch.randn(vocabulary, generator=draw, dtype=torch.float64) if bias else None
    labels_T = torch.randint(0, vocabulary, (tokens,), generator=draw)
    labels_T[::3] = -100
    tensors = [t if t is None else t.to(dtype).requires_grad_() for t in (hidden_TH, weight_VH, bias_V)]
    return *tensors, labels_T


def plain(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> Tensor:
    logits_TV = F.linear(hidden_TH, weight_VH, bias_V)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), labels_T, reduction="sum")


def with_gradients(function, tensors) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:3] if t is not None]
    loss = function(*leaves, *([None] if tensors[2] is None else []), tensors[3])
    (0.3 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def fused(*tensors: Tensor) -> Tensor:
    return linear_cross_entropy(*tensors)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_loss_and_gradients_are_those_of_all_logits_at_once(tokens, bias):
    tensors = inputs(tokens, bias=bias)
    for ours, theirs in zip(with_gradients(fused, tensors), with_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 11])
def test_chunks_of_any_size_add_up(size):
    tensors = [t.detach() for t in inputs()]
    losses_T, gradients = Chunks(*tensors, size).run(with_gradients=True)
    whole_T, of_whole = Chunks(*tensors, 100).run(with_gradients=True)
    for ours, theirs in zip((losses_T, *gradients), (whole_T, *of_whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "size"),
    [(0, 8, 128), (1, 8, 128), (700, 1, 768), (700, 8, 128), (700, 3, 256), (9, 999, 128)],
)
def test_chunks_are_few_and_of_much_the_same_size(num_rows, row_bytes, size, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", 1024)
    assert rows_at_a_time(num_rows, row_bytes) == size


def test_one_chunk_of_logits_is_held_at_a_time(monkeypatch):
    made: list[weakref.ref[Tensor]] = []
    linear = F.linear

    def watched(*tensors: Tensor | None) -> Tensor:
        assert not any(ref() is not None for ref in made)
        logits_CV = linear(*tensors)
        made.append(weakref.ref(logits_CV))
        return logits_CV

    monkeypatch.setattr(F, "linear", watched)
    Chunks(*(t.detach() for t in inputs()), size=4).run(with_gradients=True)
    assert len(made) == 3


def test_missing_labels_have_no_loss_and_no_gradient():
    hidden_TH, weight_VH, bias_V, labels_T = inputs()
    total, losses_T, *_ = linear_cross_entropy(hidden_TH, weight_VH, bias_V, labels_T)
    total.backward()
    assert torch.equal(losses_T == 0, labels_T == -100)
    assert torch.equal(hidden_TH.grad.abs().sum(1) == 0, labels_T == -100)
    nothing, *_ = linear_cross_entropy(hidden_TH, weight_VH, bias_V, torch.full_like(labels_T, -100))
    assert float(nothing.detach()) == 0


def test_without_gradients_none_are_computed():
    total, losses_T, *gradients = linear_cross_entropy(*(t.detach() for t in inputs()), with_gradients=False)
    assert [gradient.numel() for gradient in gradients] == [0, 0, 0]
    assert float(losses_T.sum()) == float(total)


def test_sums_over_chunks_of_bf16_are_as_near_the_truth_as_one_product(monkeypatch):
    exact, rounded = inputs(512, 16, 64, False), inputs(512, 16, 64, False, torch.bfloat16)
    truth = with_gradients(plain, exact)
    one_product = with_gradients(plain, rounded)
    monkeypatch.setattr(op, "CHUNK_BYTES", 128 * 64 * 2)
    for value, once, ours in zip(truth, one_product, with_gradients(fused, rounded), strict=True):
        allowed = 1.1 * (once.double() - value).norm() + 1e-12
        assert (ours.double() - value).norm() <= allowed


def test_the_op_keeps_its_promises_to_autograd_and_compile():
    torch.library.opcheck(linear_cross_entropy, inputs(5, 4, 7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [37, 257, 4096, 50304])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_on_a_gpu_loss_and_gradients_are_as_near_the_truth_as_plain_ones(dtype, vocabulary, in_chunks, monkeypatch):
    if in_chunks:
        monkeypatch.setattr(op, "CHUNK_BYTES", 0)  # 128 rows each
    tensors = [t.detach().to("cuda") for t in inputs(700, 64, vocabulary, False)[:2]]
    labels_T = inputs(700, 64, vocabulary, False)[3].cuda()
    truth = with_gradients(plain, (*tensors, None, labels_T))
    rounded = (*(t.to(dtype) for t in tensors), None, labels_T)
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    results = zip(truth, with_gradients(plain, rounded), with_gradients(fused, rounded), strict=True)
    for value, once, ours in results:
        assert (ours.double() - value).norm() <= 1.2 * (once.double() - value).norm() + 1e-5 * value.norm()
    torch.backends.cuda.matmul.allow_tf32 = matmul


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_does_not_grow_with_the_logits():
    hidden_TH = torch.randn(32768, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(50304, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels_T = torch.randint(0, 50304, (32768,), device="cuda")
    fused(hidden_TH, weight_VH, None, labels_T).backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(hidden_TH, weight_VH, None, labels_T).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30  # all logits in bf16 alone: 3.1 GiB


INTERPRETED = """
import torch
from remoe.kernels.linear_cross_entropy import kernel, reference
kernel._BLOCK_V = 16
logits_CV = torch.randn(7, 37, generator=torch.Generator().manual_seed(0)).to(torch.{dtype})
labels_C = torch.tensor([0, 36, -100, 5, 17, 16, 15])
for with_gradients in (False, True):
    ours, theirs = logits_CV.clone(), logits_CV.clone()
    losses_C = kernel.softmax_gradient_triton_(ours, labels_C, with_gradients)
    torch.testing.assert_close(losses_C, reference.softmax_gradient_(theirs, labels_C, with_gradients))
    torch.testing.assert_close(ours, theirs)
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_triton_kernel_agrees_with_the_reference_under_the_interpreter(dtype):
    pytest.importorskip("triton")
    script = [sys.executable, "-c", INTERPRETED.format(dtype=dtype)]
    done = subprocess.run(script, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
