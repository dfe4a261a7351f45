"""The grouped linear map against one linear map an expert: values, gradients, idle experts, torch's own checks."""

import pytest
import torch

from remoe.kernels.grouped_linear import grouped_linear, reference


def inputs(counts):
    generator = torch.Generator().manual_seed(sum(counts))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    offsets = torch.tensor([0, *counts]).cumsum(0)
    return draw(sum(counts), 5), draw(len(counts), 3, 5), draw(len(counts), 3), offsets


@pytest.mark.parametrize("counts", [[1], [0], [4, 0, 7], [0, 0], [1, 2, 3, 4]])
def test_values_and_gradients_match_one_linear_map_an_expert(counts):
    *tensors, offsets = inputs(counts)
    actual, expected = grouped_linear(*tensors, offsets), reference.grouped_linear(*tensors, offsets)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(actual)
    for own, plain in zip(
        *(torch.autograd.grad((out * direction).sum(), tensors) for out in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-12)


def test_torch_finds_nothing_wrong_with_the_op():
    torch.library.opcheck(grouped_linear, inputs([4, 0, 7]))
    *tensors, offsets = inputs([2, 0, 1])
    assert torch.autograd.gradcheck(lambda *args: grouped_linear(*args, offsets), tensors)
