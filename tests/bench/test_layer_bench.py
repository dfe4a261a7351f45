"""The layer benchmark on tiny shapes."""

import json
from pathlib import Path

import pytest
import torch

from remoe.bench import ours, peers, profile
from remoe.bench.clock import Clock
from remoe.bench.layer import LayerBench, bench_layer
from remoe.bench.limits import Limits
from remoe.bench.numerics import TENSORS, errors, expected, plain_results, relative_error, too_large
from remoe.bench.peers import NotApplicable
from remoe.bench.problem import ROUTES, Problem
from remoe.bench.results import MismatchError
from remoe.bench.shapes import SHAPES, LayerShape
from remoe.moe import experts

CPU = torch.device("cpu")
LIMITS = Limits(matmul_tflops=790, copy_gb_per_second=3000, bytes_a_number=2)


def tiny_bench(**changes) -> LayerBench:
    settings = {"shapes": [SHAPES["tiny"]], "peers": ["dense", "grouped_mm"], "device": CPU, "dtype": torch.float32}
    return LayerBench(**(settings | changes))


@pytest.fixture
def problem() -> Problem:
    return Problem(SHAPES["tiny"], CPU, torch.float32)


# performance.md's companion, section 2: 790 TFLOP/s, 3.0 TB/s
@pytest.mark.parametrize(
    ("name", "forward_ms", "both_ms"),
    [
        ("remoe182m_E8", 0.29, 0.88),
        ("remoe978m_E8", 1.17, 3.52),
        ("remoe469m_E128", 1.30, 3.96),
        ("remoe182m_G64", 1.26, 2.78),
        ("stage1_182m_E8", 1.17, 3.52),
    ],
)
def test_floor_of_a_shape_is_the_published_one(name: str, forward_ms: float, both_ms: float):
    assert LIMITS.floor_ms(SHAPES[name], backward=False) == pytest.approx(forward_ms, abs=0.012)
    assert LIMITS.floor_ms(SHAPES[name], backward=True) == pytest.approx(both_ms, abs=0.012)


def test_many_experts_are_bound_by_their_weights_and_few_by_their_products():
    many, few = SHAPES["remoe469m_E128"], SHAPES["remoe182m_E8"]
    products = {shape: shape.flops(True) / LIMITS.matmul_tflops / 1e9 for shape in (many, few)}
    assert LIMITS.floor_ms(many, backward=True) > products[many]
    assert LIMITS.floor_ms(few, backward=True) == products[few]


@pytest.mark.parametrize("route", ROUTES)
def test_every_routing_has_the_same_number_of_pairs(problem: Problem, route: str):
    _, map_TE = problem.route(route).dense()
    assert int(map_TE.sum()) == problem.shape.num_pairs


def test_variable_routing_uses_different_numbers_of_experts_and_fixed_ones_do_not(problem: Problem):
    counts = {name: problem.route(name).dense()[1].sum(1) for name in ROUTES}
    assert counts["var"].unique().numel() > 2
    assert counts["even_var"].unique().numel() > 2
    assert counts["topk"].unique().tolist() == counts["even_fixed"].unique().tolist() == [problem.shape.top_k]


@pytest.mark.parametrize("route", ["even_fixed", "even_var"])
def test_even_routings_give_each_expert_as_many_tokens(problem: Problem, route: str):
    per_expert = problem.route(route).dense()[1].sum(0)
    assert per_expert.unique().tolist() == [problem.shape.num_pairs // problem.shape.num_experts]


def test_neighbouring_experts_share_no_more_tokens_than_others():
    shape = LayerShape(name="", num_tokens=4096, hidden_size=8, expert_size=8, num_experts=16, top_k=4)
    map_TE = Problem(shape, CPU, torch.float32).route("even_fixed").dense()[1].float()
    shared_EE = map_TE.T @ map_TE
    neighbours = shared_EE.diagonal(1).mean()
    assert 0.9 < neighbours / (shape.num_pairs * (shape.top_k - 1) / (16 * 15)) < 1.1


@pytest.mark.parametrize("route", ["topk", "var"])
def test_lists_and_padded_lists_hold_the_pairs_of_the_dense_routing(problem: Problem, route: str):
    routing = problem.route(route)
    weights_TE, _ = routing.dense()
    from_lists, from_padded = torch.zeros_like(weights_TE), torch.zeros(weights_TE.shape[0], weights_TE.shape[1] + 1)
    token_N, expert_N, weight_N = routing.lists()
    from_lists[token_N, expert_N] = weight_N.detach()
    index_TK, weights_TK = routing.padded()
    from_padded.scatter_(1, index_TK, weights_TK.detach())
    assert torch.equal(from_lists, weights_TE)
    assert torch.equal(from_padded[:, :-1], weights_TE)
    assert not from_padded[:, -1].any()


@pytest.mark.parametrize("route", ["topk", "var"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("column", list(ours.COLUMNS))
def test_our_layer_is_as_near_the_reference_as_the_plain_path(column: str, route: str, dtype: torch.dtype):
    problem = Problem(SHAPES["tiny_E16"], CPU, dtype)
    routing = problem.route(route)
    if column not in ("remoe", "remoe_capacity", "remoe_plain"):
        with pytest.raises(peers.NotApplicable):
            ours.COLUMNS[column](problem, routing)
        return
    wanted = expected(problem, routing)
    out_TH = ours.COLUMNS[column](problem, routing)()
    grads = torch.autograd.grad(out_TH, problem.leaves(routing), problem.grad_out_TH)
    found = errors(dict(zip(TENSORS, (out_TH, *grads), strict=True)), wanted.results, routing)
    assert too_large(found, wanted.plain, dtype) == []


@pytest.mark.parametrize("name", ["grouped_mm", "loop"])
@pytest.mark.parametrize("route", ["topk", "var"])
def test_peers_compute_the_same_layer(problem: Problem, name: str, route: str):
    routing = problem.route(route)
    wanted = plain_results(problem, routing, torch.float64)["out"]
    assert relative_error(peers.build(name, problem, routing)(), wanted) < 1e-6


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["transformers", "transformers_grouped_mm"])
@pytest.mark.parametrize("route", ["topk", "var"])
def test_transformers_computes_the_same_layer(problem: Problem, name: str, route: str):
    pytest.importorskip("transformers")
    routing = problem.route(route)
    wanted = plain_results(problem, routing, torch.float64)
    out_TH = peers.build(name, problem, routing)()
    grads = torch.autograd.grad(out_TH, problem.leaves(routing), problem.grad_out_TH)
    found = errors(dict(zip(TENSORS, (out_TH, *grads), strict=True)), wanted, routing)
    assert max(found.values()) < 1e-5


def test_rows_hold_times_rates_errors_and_the_limit_and_the_file_has_them(tmp_path: Path):
    results = bench_layer(tiny_bench(path=tmp_path / "layer.json"))
    row = results.rows[0]
    assert (row["candidate"], row["kind"], row["route"]) == ("remoe", "ours", "topk")
    assert row["floor_ms"] > 0
    assert 0 < row["forward_ms"] < row["forward_backward_ms"]
    flops = 18 * 64 * 2 * 32 * 16
    assert row["tflops"] == pytest.approx(flops / row["forward_backward_ms"] / 1e9)
    assert set(row["errors"]) == set(TENSORS)
    written = json.loads((tmp_path / "layer.json").read_text())
    assert written["benchmark"] == "layer"
    assert written["limits"]["matmul_tflops"] > 0
    assert [(r["candidate"], r["route"]) for r in written["rows"]] == [
        (r["candidate"], r["route"]) for r in results.rows
    ]


def test_a_wrong_layer_of_ours_is_an_error_that_names_shape_tensor_and_figures(monkeypatch: pytest.MonkeyPatch):
    right = ours.exact
    monkeypatch.setitem(ours.COLUMNS, "remoe", lambda problem, routing: lambda: right(problem, routing)() * 1.01)
    results = bench_layer(tiny_bench(peers=[]))
    with pytest.raises(MismatchError, match=r"remoe at tiny/topk, out: 1\.000e-02, allowed .* plain") as raised:
        results.check()
    assert raised.value.exit_code == 1


def test_a_layer_of_ours_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def broken(problem, routing):
        raise RuntimeError("no kernel")

    monkeypatch.setitem(ours.COLUMNS, "remoe", broken)
    with pytest.raises(MismatchError, match="remoe at tiny/topk failed: RuntimeError: no kernel"):
        bench_layer(tiny_bench(peers=[])).check()


def test_a_peer_that_fails_leaves_the_others_their_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(peers.PEERS, "grouped_mm", "remoe.bench.peers.dense:nothing")
    results = bench_layer(tiny_bench(peers=["grouped_mm", "loop"]))
    results.check()
    by_name = {row["candidate"]: row for row in results.rows}
    assert "AttributeError" in by_name["grouped_mm"]["error"]
    assert by_name["loop"]["forward_backward_ms"] > 0


def test_the_dense_start_is_worked_off_in_chunks_of_what_its_steady_state_keeps(monkeypatch: pytest.MonkeyPatch):
    problem = Problem(SHAPES["stage1_tiny"], CPU, torch.float32)
    with pytest.raises(NotApplicable, match="the same as without chunks"):
        ours.COLUMNS["remoe_chunked"](problem, problem.route("var"))
    monkeypatch.setattr(experts, "_ROWS_OF_NO_CONCERN", 1)
    routing = problem.route("var")
    assert torch.equal(ours.COLUMNS["remoe_chunked"](problem, routing)(), ours.exact(problem, routing)())


def test_a_library_that_is_not_installed_is_said_once():
    rows = bench_layer(tiny_bench(peers=["sonicmoe"])).rows
    assert [row["note"] for row in rows if row["candidate"] == "sonicmoe"] == ["sonicmoe is not installed"]


def test_what_begins_after_the_deadline_is_left_out():
    rows = bench_layer(tiny_bench(deadline_seconds=0.0)).rows
    assert rows == [{"shape": "tiny", "note": "left out: deadline"}]


def test_a_profile_lists_kernels_whose_shares_add_up():
    row = bench_layer(tiny_bench(peers=[], profile=True)).rows[0]
    *kernels, everything = row["profile"]
    assert everything["kernel"] == "all"
    listed = [kernel for kernel in kernels if kernel["kernel"] != "matrix products"]
    assert len(listed) == 20
    assert sum(kernel["share"] for kernel in listed) <= 1 + 1e-9
    assert {"kernel", "calls", "us", "share"} <= kernels[0].keys()


def test_our_kernels_are_rated_by_their_products_or_their_traffic(monkeypatch: pytest.MonkeyPatch):
    kernels = [
        {"kernel": "rows_matmul_kernel", "calls": 3, "us": 1000.0, "share": 0.4},
        {"kernel": "weight_grad_kernel", "calls": 1, "us": 500.0, "share": 0.2},
        {"kernel": "combine_kernel", "calls": 2, "us": 100.0, "share": 0.1},
    ]
    monkeypatch.setattr(profile, "kernels_of", lambda call, clock: kernels)
    shape = SHAPES["remoe182m_E8"]
    matmul, weight_grad, combine, everything = profile.profile_step(lambda: None, shape, Clock(CPU), 2)
    product = 2 * 16384 * 768 * 3072
    assert matmul["tflops"] == pytest.approx(4 * product / 1e-3 / 1e12)
    assert "tflops" not in weight_grad  # torch has taken the other call: of 1 or of 2 products
    assert combine["gb_per_second"] == pytest.approx(2 * 2 * 16384 * 768 * 2 / 1e-4 / 1e9)
    assert everything["calls"] == 6


@pytest.mark.parametrize("swiglu", ["swiglu_fwd_kernel", "kernel_quackgemm_actGemmGatedSm90_object"])
@pytest.mark.parametrize(("num_forward", "is_rated"), [(2, True), (3, False)])
def test_nothing_is_rated_in_a_step_whose_layers_compute_rows_again(
    swiglu: str, num_forward: int, is_rated: bool, monkeypatch: pytest.MonkeyPatch
):
    kernels = [
        {"kernel": swiglu, "calls": num_forward, "us": 1000.0, "share": 0.6},
        {"kernel": "swiglu_bwd_kernel", "calls": 2, "us": 500.0, "share": 0.4},
    ]
    monkeypatch.setattr(profile, "kernels_of", lambda call, clock: kernels)
    forward, backward, _ = profile.profile_step(lambda: None, SHAPES["remoe182m_E8"], Clock(CPU), 2)
    assert ("tflops" in forward, "gb_per_second" in backward) == (is_rated, is_rated)


def test_a_relative_error_counts_a_nan():
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) != relative_error(torch.ones(1), torch.ones(1))
    assert too_large(dict.fromkeys(TENSORS, float("nan")), dict.fromkeys(TENSORS, 1.0), torch.float32), (
        "NaN is never small enough"
    )
