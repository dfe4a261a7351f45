"""The op against its reference: forward, every gradient, odd shapes, empty and full maps; gradcheck and opcheck."""

import pytest
import torch

from remoe.kernels.expert_mlp import expert_mlp, huge_pages, reference
from remoe.kernels.expert_mlp.backends import has_quack
from remoe.moe.dispatch import plan

SHAPES = [  # tokens, experts, hidden, ffn
    (1, 1, 8, 8),
    (7, 3, 8, 16),
    (65, 8, 24, 48),
    (33, 16, 40, 56),
]


def random_inputs(tokens, experts, hidden, ffn, density, dtype=torch.float64):
    g = torch.Generator().manual_seed(tokens + experts)
    routing_map = torch.rand(tokens, experts, generator=g) < density

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    weights = draw(tokens, experts).abs() * routing_map
    tensors = (draw(tokens, hidden), weights, draw(experts, 2 * ffn, hidden), draw(experts, hidden, ffn))
    return routing_map, tuple(tensor.requires_grad_() for tensor in tensors)


def run_op(routing_map, tensors):
    return expert_mlp(*tensors, *plan(routing_map).lists)[0]


def run_reference(routing_map, tensors):
    hidden, weights, gate_up, down = tensors
    return reference.expert_mlp(hidden, weights, routing_map, gate_up, down)


def with_gradients(run, routing_map, tensors):
    out = run(routing_map, tensors)
    return out, *torch.autograd.grad(along_a_direction(out), tensors)


def along_a_direction(out):
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    return (out * direction).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_matches_the_reference_forward_and_every_gradient(shape, density):
    routing_map, tensors = random_inputs(*shape, density)
    for actual, expected in zip(
        with_gradients(run_op, routing_map, tensors), with_gradients(run_reference, routing_map, tensors), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_float32_is_as_near_to_float64_as_rounding_allows():
    routing_map, tensors = random_inputs(65, 8, 24, 48, 0.3)
    exact = with_gradients(run_op, routing_map, tensors)
    single = tuple(tensor.detach().float().requires_grad_() for tensor in tensors)
    for actual, expected in zip(with_gradients(run_op, routing_map, single), exact, strict=True):
        assert (actual.double() - expected).norm() / expected.norm() < 1e-6  # 2^-24 a step, a few hundred summed


def test_an_active_pair_of_weight_zero_still_gets_its_gate_gradient():
    routing_map, (hidden, _, gate_up, down) = random_inputs(4, 2, 8, 8, 1.0)
    weights = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(run_op(routing_map, (hidden, weights, gate_up, down)).sum(), weights)
    (expected,) = torch.autograd.grad(run_reference(routing_map, (hidden, weights, gate_up, down)).sum(), weights)
    assert expected.abs().min() > 0
    torch.testing.assert_close(gradient, expected)


def test_gradcheck():
    routing_map, tensors = random_inputs(5, 3, 8, 8, 0.5)
    assert torch.autograd.gradcheck(lambda *t: run_op(routing_map, t), tensors)


def with_sums(lists, tensors, *row_cap_and_backend):
    """As with_gradients, with those of the matrices added to sums that begin at 1."""
    sums = tuple(torch.ones_like(matrix, dtype=torch.float32) for matrix in tensors[2:])
    row_cap, backend = row_cap_and_backend or (0, "auto")
    out, _ = expert_mlp(*tensors, *lists, row_cap, backend, *sums)
    grads = torch.autograd.grad(along_a_direction(out), tensors, allow_unused=True)
    assert grads[2:] == (None, None)
    return out, *grads[:2], *((gradient_sum - 1).to(out.dtype) for gradient_sum in sums)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_with_sums_the_gradients_of_the_matrices_are_added_to_them(density):
    routing_map, tensors = random_inputs(65, 8, 24, 48, density, torch.float32)
    actual = with_sums(plan(routing_map).lists, tensors)
    for a, b in zip(actual, with_gradients(run_op, routing_map, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # 1 + g - 1 rounds g to 2^-24 of what was there


def test_half_of_the_sums_is_an_error():
    routing_map, tensors = random_inputs(7, 3, 8, 16, 0.3, torch.float32)
    with pytest.raises(AssertionError, match="both sums or none"):
        expert_mlp(*tensors, *plan(routing_map).lists, 0, "auto", torch.zeros_like(tensors[2]))


def test_two_forward_passes_may_add_to_the_same_sums():
    routing_map, tensors = random_inputs(7, 3, 8, 16, 0.3, torch.float32)
    sums = tuple(torch.zeros_like(matrix) for matrix in tensors[2:])
    lists = plan(routing_map).lists
    outs = [expert_mlp(*tensors, *lists, 0, "auto", *sums)[0] for _ in range(2)]
    outs[0].sum().backward()
    once = [gradient_sum.clone() for gradient_sum in sums]
    outs[1].sum().backward()
    for twice, first in zip(sums, once, strict=True):
        assert first.abs().sum() > 0
        torch.testing.assert_close(twice, 2 * first)


def test_opcheck_accepts_the_op():
    routing_map, tensors = random_inputs(5, 3, 8, 8, 0.5, torch.float32)
    lists = plan(routing_map).lists
    torch.library.opcheck(torch.ops.remoe.expert_mlp.default, (*tensors, *lists))
    sums = tuple(torch.zeros_like(matrix, requires_grad=False) for matrix in tensors[2:])
    torch.library.opcheck(torch.ops.remoe.expert_mlp.default, (*tensors, *lists, 0, "auto", *sums))
    detached = [tensor.detach() for tensor in tensors]
    out, up = expert_mlp(*detached, *lists)
    given = (torch.ones_like(out), up, *detached, *lists, 0, "auto", *sums)
    torch.library.opcheck(torch.ops.remoe.expert_mlp_backward_adding.default, given)


def test_same_bits_on_every_run():
    routing_map, tensors = random_inputs(65, 8, 24, 48, 0.4, torch.float32)
    first, second = (with_gradients(run_op, routing_map, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_that_nobody_wrote_never_shows(monkeypatch):
    def poisoned(tensor, *args, **kwargs):
        return torch.full_like(tensor, float("nan"))

    routing_map, tensors = random_inputs(7, 3, 8, 16, 0.4)
    routing_map = routing_map & (torch.arange(3) != 1)  # expert 1 is idle
    expected = with_gradients(run_reference, routing_map, tensors)
    monkeypatch.setattr(huge_pages, "empty_like", poisoned)
    for actual, reference_value in zip(with_gradients(run_op, routing_map, tensors), expected, strict=True):
        torch.testing.assert_close(actual, reference_value, rtol=1e-11, atol=1e-11)


def test_large_buffers_on_huge_pages_are_ordinary_tensors():
    weight = torch.empty(3, 1024, 1024)
    buffer = huge_pages.empty_like(weight)
    assert buffer.shape == weight.shape
    assert buffer.dtype == weight.dtype
    assert buffer.fill_(1).sum().item() == weight.numel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(65, 8, 64, 96), (512, 16, 128, 48), (1, 4, 64, 64)])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_bf16_on_a_gpu_is_near_the_float64_reference(shape, density):
    routing_map, tensors = random_inputs(*shape, density)
    hidden, weights, gate_up, down = tensors
    small = [hidden, weights, gate_up * 0.1, down * 0.1]
    rounded = [t.detach().to("cuda", torch.bfloat16) for t in small]
    rounded[1] = weights.detach().to("cuda", torch.float32)
    on_gpu = tuple(t.requires_grad_() for t in rounded)
    exact = tuple(t.detach().double().cpu().requires_grad_() for t in on_gpu)
    actual = with_gradients(run_op, routing_map.cuda(), on_gpu)
    expected = with_gradients(run_reference, routing_map, exact)
    for a, b in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert (a.double().cpu() - b).norm() <= 0.02 * b.norm() + 1e-12  # a few bf16 roundings of 2^-8


def on_gpu(tensors, dtype):
    hidden, weights, gate_up, down = tensors
    rounded = [t.detach().to("cuda", dtype) for t in (hidden, weights, gate_up * 0.1, down * 0.1)]
    rounded[1] = weights.detach().to("cuda", torch.float32)
    return tuple(t.requires_grad_() for t in rounded)


def relative_errors(actual, expected):
    return [(a.double().cpu() - b).norm() / (b.norm() + 1e-12) for a, b in zip(actual, expected, strict=True)]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def skip_without(backend):
    if backend == "quack" and not has_quack(torch.device("cuda")):
        pytest.skip("needs QuACK and a Hopper GPU")


@pytest.fixture(params=["triton", "quack"])
def kernels(request):
    """The name of a fused back-end that this machine has."""
    skip_without(request.param)
    return request.param


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (65, 8, 64, 48), (512, 16, 128, 96), (2000, 4, 264, 1024)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_fused_kernels_are_as_exact_as_the_plain_path_in_every_dtype(shape, density, dtype, kernels):
    if kernels == "quack" and dtype == torch.float32:
        pytest.skip("QuACK has no products of fp32")
    routing_map, tensors = random_inputs(*shape, density)
    rounded = on_gpu(tensors, dtype)
    exact = tuple(t.detach().double().cpu().requires_grad_() for t in rounded)
    expected = with_gradients(run_reference, routing_map, exact)
    lists = plan(routing_map.cuda()).lists
    by_path = {
        name: relative_errors(
            with_gradients(lambda _, t, name=name: expert_mlp(*t, *lists, 0, name)[0], None, rounded), expected
        )
        for name in (kernels, "plain")
    }
    for ours, plain in zip(by_path[kernels], by_path["plain"], strict=True):
        assert ours <= 1.5 * plain + 1e-6


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", [(65, 8, 64, 48), (512, 16, 128, 96), (2000, 4, 264, 1024)])
@pytest.mark.parametrize("row_cap", [0, 256])
def test_sums_on_a_gpu_are_as_exact_as_the_plain_path_and_the_same_on_every_run(shape, row_cap, kernels):
    routing_map, tensors = random_inputs(*shape, 0.3)
    rounded = on_gpu(tensors, torch.bfloat16)
    exact = tuple(t.detach().double().cpu().requires_grad_() for t in rounded)
    expected = with_gradients(run_reference, routing_map, exact)
    lists = plan(routing_map.cuda()).lists
    plain = with_gradients(lambda _, t: expert_mlp(*t, *lists, 0, "plain")[0], None, rounded)
    first, second = (with_sums(lists, rounded, row_cap, kernels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for ours, theirs in zip(relative_errors(first, expected), relative_errors(plain, expected), strict=True):
        assert ours <= 1.5 * theirs + 1e-6


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("backend", ["triton", "quack", "grouped_mm"])
def test_unwritten_rows_of_a_capacity_and_chunks_change_nothing(backend):
    skip_without(backend)
    routing_map, tensors = random_inputs(700, 8, 64, 96, 0.4)
    rounded = on_gpu(tensors, torch.bfloat16)
    routing_map = routing_map.cuda()

    def run(capacity, row_cap):
        lists = plan(routing_map, capacity).lists
        return with_gradients(lambda _, t: expert_mlp(*t, *lists, row_cap, backend)[0], None, rounded)

    whole = run(None, 0)
    for other in (run(routing_map.numel(), 0), run(routing_map.numel(), 256)):
        for a, b in zip(whole, other, strict=True):  # other tiles, other order of sums; chunks round once more
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


@pytest.mark.gpu
@gpu
def test_fused_kernels_give_the_same_bits_on_every_run_and_in_a_graph(kernels):
    routing_map, tensors = random_inputs(700, 8, 64, 96, 0.4)
    routing_map = routing_map & (torch.arange(8) != 3)  # expert 3 is idle
    rounded = on_gpu(tensors, torch.bfloat16)
    lists = plan(routing_map.cuda(), 3000).lists
    direction = torch.randn_like(rounded[0])

    def run():
        leaves = [tensor.detach().requires_grad_() for tensor in rounded]  # those of the stream at hand
        out = expert_mlp(*leaves, *lists, 0, kernels)[0]
        return out, *torch.autograd.grad(out, leaves, direction)

    first, second = run(), run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    for a, b, c in zip(first, second, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1, 1), (700, 8), (300, 64), (100, 1024), (5000, 3)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_the_lists_of_a_gpu_are_those_of_a_cpu(tokens, experts, density):
    routing_map = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1)) < density
    expected = plan(routing_map)
    actual, roomy = plan(routing_map.cuda()), plan(routing_map.cuda(), routing_map.numel() + 8)
    for a, b, c in zip(expected.lists, actual.lists, roomy.lists, strict=True):
        assert torch.equal(a, b.cpu())
        assert torch.equal(a, c.cpu()[: len(a)])
    assert not roomy.overflow
    if expected.token_N.numel() > 1:
        assert plan(routing_map.cuda(), 1).overflow
