"""A linear router's logits: against products in fp64, with gradients; on a GPU beside a library's fp32."""

import pytest
import torch
from torch.nn import functional as F

from remoe.kernels.router_logits import is_worth_it, reference, router_logits, router_logits_backward

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(num_tokens=1024, num_experts=8, hidden_size=48, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TH = torch.randn(num_tokens, hidden_size, generator=generator).to(device, dtype)
    weight_EH = (0.01 * torch.randn(num_experts, hidden_size, generator=generator)).to(device)
    grad_TE = torch.randn(num_tokens, num_experts, generator=generator).to(device)
    return hidden_TH.requires_grad_(), weight_EH.requires_grad_(), grad_TE


def distances(found, exact):
    pairs = ((a.detach().double(), b) for a, b in zip(found, exact, strict=True))
    return [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]


def exact_of(hidden_TH, weight_EH, grad_TE):
    hidden_TH, weight_EH, grad_TE = (tensor.detach().double() for tensor in (hidden_TH, weight_EH, grad_TE))
    return reference.router_logits(hidden_TH, weight_EH), *reference.gradients(grad_TE, hidden_TH, weight_EH)


def with_gradients(logits_TE, hidden_TH, weight_EH, grad_TE):
    return logits_TE, *torch.autograd.grad((logits_TE * grad_TE).sum(), (hidden_TH, weight_EH))


def test_logits_and_gradients_are_those_of_a_product_in_fp64():
    hidden_TH, weight_EH, grad_TE = problem()
    found = with_gradients(router_logits(hidden_TH, weight_EH), hidden_TH, weight_EH, grad_TE)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.float32]
    logits, grad_hidden, grad_weight = distances(found, exact_of(hidden_TH, weight_EH, grad_TE))
    assert max(logits, grad_weight) < 1e-6
    assert grad_hidden < 2**-8


def test_torch_finds_nothing_wrong_with_the_ops():
    hidden_TH, weight_EH, grad_TE = problem(9, 4)
    torch.library.opcheck(router_logits, (hidden_TH, weight_EH))
    transposed_TH = hidden_TH.detach().T.contiguous().T
    torch.library.opcheck(router_logits_backward, (grad_TE, transposed_TH, weight_EH.detach()))


def test_a_compiled_call_takes_any_number_of_tokens():
    compiled = torch.compile(router_logits, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (9, 10, 33):
            hidden_TH, weight_EH, _ = problem(num_tokens, 4)
            assert torch.equal(compiled(hidden_TH, weight_EH), router_logits(hidden_TH, weight_EH))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1024, 8, 768), (1025, 1, 48), (4099, 20, 1000), (16384, 64, 1536), (0, 8, 64)])
def test_on_a_gpu_they_are_as_close_as_a_librarys_fp32_products_and_the_same_bits_each_time(sizes, dtype):
    hidden_TH, weight_EH, grad_TE = problem(*sizes, dtype, "cuda")
    exact = exact_of(hidden_TH, weight_EH, grad_TE)
    library_TE = F.linear(hidden_TH.float(), weight_EH)
    librarys = distances(with_gradients(library_TE, hidden_TH, weight_EH, grad_TE), exact)
    own = with_gradients(router_logits(hidden_TH, weight_EH), hidden_TH, weight_EH, grad_TE)
    again = with_gradients(router_logits(hidden_TH, weight_EH), hidden_TH, weight_EH, grad_TE)
    # Both round sums in fp32; the parts of a weight leave out up to 2^-22 of it
    assert all(a <= 1.5 * b + 2**-22 for a, b in zip(distances(own, exact), librarys, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_it_is_for_many_tokens_in_half_precision_and_few_experts():
    def is_chosen(*sizes, dtype=torch.bfloat16, device="cuda"):
        return is_worth_it(*problem(*sizes, 16, dtype, device)[:2])

    assert is_chosen(1024, 64)
    assert not is_chosen(1023, 64)
    assert not is_chosen(1024, 65)
    assert not is_chosen(1024, 64, dtype=torch.float32)
    assert not is_chosen(1024, 64, device="cpu")
