"""Runs the Triton kernels in Triton's interpreter beside the plain path; prints the largest error of each case as JSON.

A program of its own: the interpreter is chosen before triton is first imported. It multiplies bf16 wrongly (seen with
3.6 and 3.7), so the cases are fp32 and fp16.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
import weakref
from functools import partial
from unittest import mock

import plain_quack
import torch
import triton
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from remoe.kernels.dispatch_lists import reference
from remoe.kernels.dispatch_lists.kernel import dispatch_lists_triton
from remoe.kernels.expert_mlp import fused, per_expert
from remoe.kernels.expert_mlp.combine import gather_sum
from remoe.kernels.expert_mlp.rows_kernels import swiglu_bwd_kernel
from remoe.kernels.expert_mlp.tiles import Choices, QuackTiles, Tiles
from remoe.kernels.router_logits import reference as router_reference
from remoe.kernels.router_logits.kernel import gradients_triton, router_logits_triton
from remoe.kernels.rows.kernel import combine_rows_triton

SHAPES = [(1, 1, 8, 8), (7, 3, 8, 16), (40, 8, 24, 48)]  # tokens, experts, hidden, ffn
CHOICES = {
    "gathered": Choices(*[Tiles(16, 32, 32, 4, 2)] * 6, copies_rows=False),
    "copied": Choices(*[Tiles(32, 32, 16, 4, 2)] * 6, copies_rows=True),
    "quack gathered": Choices(*[QuackTiles(128, 192, 1, True)] * 6, copies_rows=False),
    "quack copied": Choices(*[QuackTiles(128, 192, 1, True)] * 6, copies_rows=True),
}
ROWS = {"exact": (0, 0), "roomy": (5, 0), "chunked": (9, 24)}  # rows without a pair, row cap


def problem(shape, density, dtype):
    tokens, experts, hidden, ffn = shape
    generator = torch.Generator().manual_seed(tokens)
    routing_map = torch.rand(tokens, experts, generator=generator) < density

    def draw(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    weights = torch.rand(tokens, experts, generator=generator) * routing_map
    matrices = (draw(experts, 2 * ffn, hidden) * 0.3, draw(experts, hidden, ffn) * 0.3)
    return routing_map, (draw(tokens, hidden), weights, *matrices), draw(tokens, hidden)


def add_to_block(self, kind, desc, value, indices):
    """What the interpreter lacks: a bulk copy that adds to what is there."""
    there = self.create_descriptor_load(desc, indices, None, None)
    self.create_descriptor_store(desc, TensorHandle(there.data + value.data, value.dtype), indices)


def passes(path, tensors, grad_out, lists, *row_cap):
    out, kept = path.forward(*tensors, lists, *row_cap)
    return out, *path.backward(grad_out, kept, *tensors, lists, *row_cap)


def adding_passes(tensors, grad_out, lists, row_cap):
    """The same, with the gradients of the matrices added to sums that begin at 1."""
    out, kept = fused.forward(*tensors, lists, row_cap)
    sums = tuple(torch.ones_like(matrix, dtype=torch.float32) for matrix in tensors[2:])
    grads = fused.backward(grad_out, kept, *tensors, lists, row_cap, sums)
    assert grads[2:] == (None, None)
    return out, *grads[:2], *(gradient_sum - 1 for gradient_sum in sums)


def largest_error(shape, density, dtype, rows, run):
    routing_map, tensors, grad_out = problem(shape, density, dtype)
    slack, row_cap = rows
    lists = dispatch_lists_triton(routing_map, int(routing_map.sum()) + slack)[:5]
    actual = run(tensors, grad_out, lists, row_cap)
    exact = tuple(tensor.double() for tensor in tensors)
    expected = passes(per_expert, exact, grad_out.double(), reference.dispatch_lists(routing_map)[:5])
    return max(
        float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(actual, expected, strict=True)
    )


def rows_of_past_chunks():
    """How many tensors of the chunk before are held as each chunk begins, in both passes."""
    made, held = [], []
    each_chunk = fused.Call.each_chunk

    def watched(name):
        function = getattr(fused, name)

        def call(*arguments, **settings):
            result = function(*arguments, **settings)
            rows = result if isinstance(result, tuple) else (result,)
            if name == "_swiglu" and not arguments[1].is_kept:
                rows = *rows, arguments[-1]
            made.extend(weakref.ref(one) for one in rows)
            return result

        return call

    def each_chunk_watched(call):
        for chunk in each_chunk(call):
            held.append(sum(ref() is not None for ref in made))
            made.clear()
            yield chunk

    producers = {name: watched(name) for name in ("_swiglu", "_swiglu_backward", "_made_again", "_rows_matmul")}
    with mock.patch.multiple(fused, **producers), mock.patch.object(fused.Call, "each_chunk", each_chunk_watched):
        largest_error(SHAPES[-1], 0.2, torch.float32, ROWS["chunked"], partial(passes, fused))
    return held


def gradients_in_place():
    """Whether the gradient of pre-activations took their place, of chunks that are kept and of others."""
    found = {"kept": set(), "others": set()}
    backward = fused._swiglu_backward

    def watched(call, chunk, grad_y, down_proj, up_N2F, grad_weights_TE):
        grad_up_N2F, act_NF = backward(call, chunk, grad_y, down_proj, up_N2F, grad_weights_TE)
        found["kept" if chunk.is_kept else "others"].add(grad_up_N2F is up_N2F)
        return grad_up_N2F, act_NF

    with mock.patch.object(fused, "_swiglu_backward", watched):
        largest_error(SHAPES[-1], 0.2, torch.float32, ROWS["chunked"], partial(passes, fused))
    return {chunks: sorted(values) for chunks, values in found.items()}


def lists_agree(tokens, experts, density):
    routing_map = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1)) < density
    pairs = zip(reference.dispatch_lists(routing_map), dispatch_lists_triton(routing_map, None), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def combine_error(tokens, experts, density):
    """Sums of tokens' rows, which here lie anywhere among others; the largest error."""
    generator = torch.Generator().manual_seed(2)
    routing_map = torch.rand(tokens, experts, generator=generator) < density
    _, _, row_N, _, token_offsets, num_rows = reference.dispatch_lists(routing_map)
    place_N = torch.randperm(int(num_rows) + 5, generator=generator)[row_N]
    rows_NH = torch.randn(int(num_rows) + 5, 24, generator=generator)
    expected = gather_sum(rows_NH.double(), place_N, token_offsets)
    return (combine_rows_triton(rows_NH, place_N, token_offsets) - expected).abs().max().item()


def interleaved_agrees(num_rows, expert_size, dtype):
    """Whether the gradient of SwiGLU from pre-activations that are interleaved is that from halves, bit for bit."""
    generator = torch.Generator().manual_seed(4)
    grad_act_NF = torch.randn(num_rows, expert_size, generator=generator).to(dtype)
    halves_N2F = torch.randn(num_rows, 2 * expert_size, generator=generator).to(dtype)
    pairs_N2F = halves_N2F.unflatten(1, (2, -1)).mT.flatten(1).contiguous()
    weights_N, pair_N, end = torch.rand(num_rows, generator=generator), torch.arange(num_rows), torch.tensor([num_rows])
    found = []
    for up_N2F, is_interleaved in ((halves_N2F, False), (pairs_N2F, True)):
        outs = grad_act_NF.clone(), torch.empty_like(up_N2F), torch.empty(num_rows)
        swiglu_bwd_kernel[(triton.cdiv(num_rows, 4),)](
            outs[0], up_N2F, outs[1], weights_N, pair_N, outs[2], end, expert_size, 0, num_rows,
            BLOCK_R=4, BLOCK_F=32, INTERLEAVED=is_interleaved,
        )  # fmt: skip
        found.append(outs)
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def router_errors(tokens, experts, hidden, dtype):
    """Largest errors of a router's logits and both gradients."""
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight_EH, grad_TE = torch.randn(experts, hidden, generator=generator), torch.randn(tokens, experts)
    exact = hidden_TH.double(), weight_EH.double()
    found = router_logits_triton(hidden_TH, weight_EH), *gradients_triton(grad_TE, hidden_TH, weight_EH)
    expected = router_reference.router_logits(*exact), *router_reference.gradients(grad_TE.double(), *exact)
    distances = ((a - b).norm() / b.norm().clamp(min=1e-12) for a, b in zip(found, expected, strict=True))
    return [distance.item() for distance in distances]


def main():
    InterpreterBuilder.create_descriptor_reduce = add_to_block
    fused._quack = lambda: plain_quack
    errors = {}
    for (name, choices), dtype in itertools.product(CHOICES.items(), (torch.float32, torch.float16)):
        if choices.interleaves and dtype != torch.float32:  # its products are plain ones here
            continue
        fused.choose = lambda *_, choices=choices: choices
        for shape, density, rows in itertools.product(SHAPES, (0.0, 0.4, 1.0), ROWS):
            case = f"{name} {dtype} {shape} {density} {rows}"
            errors[case] = largest_error(shape, density, dtype, ROWS[rows], partial(passes, fused))
            if density == 0.4:
                errors[f"{case} adding"] = largest_error(shape, density, dtype, ROWS[rows], adding_passes)
    sizes = [(0, 4), (1, 1), (5, 3), (33, 1), (300, 64), (700, 8)]
    lists = {f"{size} {d}": lists_agree(*size, d) for size, d in itertools.product(sizes, (0.0, 0.3, 1.0))}
    combined = {f"{size} {d}": combine_error(*size, d) for size, d in itertools.product(sizes[1:], (0.0, 0.3, 1.0))}
    shapes = [(0, 4, 16), (1, 1, 8), (130, 8, 200), (257, 20, 72), (70, 64, 136)]
    routers = {
        f"{shape} {dtype}": router_errors(*shape, dtype)
        for shape, dtype in itertools.product(shapes, (torch.float32, torch.float16))
    }
    interleaved = {
        f"{rows} {size} {dtype}": interleaved_agrees(rows, size, dtype)
        for rows, size, dtype in itertools.product((1, 9), (8, 48), (torch.float32, torch.float16))
    }
    found = {"errors": errors, "lists": lists, "combined": combined, "routers": routers, "interleaved": interleaved}
    found["past rows"], found["in place"] = rows_of_past_chunks(), gradients_in_place()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
