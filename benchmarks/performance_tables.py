"""Rebuild the tables and the chart of docs/performance.md from the files under results/: no number is typed by hand.

A table stands between `<!-- KIND FILE -->` and `<!-- end -->`; KIND is one of those in TABLES, FILE is what a benchmark
wrote, or several of them joined by +: rows of the later ones replace those of the same layer shape. Without the file
the table says so. Example:

    python benchmarks/performance_tables.py          # rewrites the page and draws the chart
    python benchmarks/performance_tables.py --check  # exits with 1 if that would change the page
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remoe.bench.chart import draw
from remoe.bench.model import RUN_STEPS, STAGE_STEPS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
LAYERS = ("results/gpu/layer.json",)
CHART = PAGE.parent / "pictures" / "layer-gpu.svg"
GIB = 2**30
BLOCK = re.compile(r"(<!-- ([a-z-]+) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CPU_TARGETS = (
    ("≥ 0.90 of a dense MLP", "topk E=8", "dense", 0.90),
    ("ReLU ≥ 0.95 of Top-K at the same number of pairs", "relu E=8", "topk E=8", 0.95),
    ("≥ 1.15 × transformers' better path", "topk E=8", "transformers grouped_mm E=8", 1.15),
)
_ROUTES = {"topk": "fixed k", "var": "variable"}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = rebuilt(before, ROOT)
    if not arguments.check:
        PAGE.write_text(after, encoding="utf-8")
        draw(_merged(LAYERS, ROOT), CHART)
    elif after != before:
        sys.exit(f"{PAGE.name} differs from results/; run: python benchmarks/performance_tables.py")


def rebuilt(page: str, root: Path) -> str:
    """The page with each table made anew."""
    return BLOCK.sub(lambda block: block[1] + _table(block[2], block[3].split("+"), root) + "\n" + block[5], page)


def _table(kind: str, names: Sequence[str], root: Path) -> str:
    missing = [Path(name).name for name in names if not (root / name).exists()]
    if missing:
        return f"Not measured yet: no {', '.join(missing)}."
    return TABLES[kind](_merged(names, root))


def _merged(names: Sequence[str], root: Path) -> dict[str, Any]:
    first, *others = (json.loads((root / name).read_text(encoding="utf-8")) for name in names)
    for other in others:
        shapes = {row["shape"] for row in other["rows"] if "shape" in row}
        first["rows"] = [row for row in first["rows"] if row.get("shape") not in shapes] + other["rows"]
    return first


def machine(results: dict[str, Any]) -> str:
    """What it was measured on, and how."""
    results = results.get("machine", results)
    device = ", ".join(results["gpus"]) or f"{results['cores']} cores of an {results['processor']}"
    libraries = (f"{name} {version}" for name, version in results["versions"].items() if version)
    text = f"{device}; {', '.join(libraries)}; {results['date'][:10]}; `{results['command']}`"
    if "limits" not in results:
        return text
    limits = results["limits"]
    rates = f"{limits['matmul_tflops']:.0f} TFLOP/s in a large product, {limits['copy_gb_per_second'] / 1e3:.2f} TB/s"
    return f"{text}. Limits measured in the same process: {rates} in a copy."


def layer(results: dict[str, Any]) -> str:
    """Times per shape: the limit, a dense MLP, ours, the best peers, the target."""
    header = ("shape (T, H, F, E, k)", "limit", "dense", "ours, variable", "ours, fixed k")
    header += ("best peer, variable", "best peer, fixed k", "target", "reached")
    rows = [_layer_row(name, rows) for name, rows in _by_shape(results).items() if _best(rows, "ours", "var")]
    return _markdown(header, rows)


def _layer_row(name: str, rows: list[Row]) -> list[str]:
    ours, target = _best(rows, "ours", "var"), rows[0].get("target_ms")
    dense = next((row for row in rows if row["kind"] == "ceiling"), None)
    reached = "" if target is None or ours is None else "yes" if ours["forward_backward_ms"] <= target else "**no**"
    return [
        f"{name} ({', '.join(map(str, rows[0]['sizes']))})",
        f"{rows[0]['floor_ms']:.2f}",
        _ms(dense),
        f"**{_ms(ours)}**",
        _ms(_best(rows, "ours", "topk")),
        _named(_best(rows, "peer", "var")),
        _named(_best(rows, "peer", "topk")),
        "" if target is None else f"≤ {target:g}",
        reached,
    ]


def memory(results: dict[str, Any]) -> str:
    """GiB between the passes and at the peak, with variable counts."""
    header = ("shape", "ours: held", "ours: peak", "fastest peer", "its held", "its peak")
    rows = []
    for name, measured in _by_shape(results).items():
        ours, peer = _best(measured, "ours", "var"), _best(measured, "peer", "var")
        cells = [name, *_gib(ours), "" if peer is None else peer["candidate"], *_gib(peer)]
        rows.append(cells)
    return _markdown(header, rows)


def errors(results: dict[str, Any]) -> str:
    """The worst error of each candidate over shapes and tensors, in units of the plain path's in the same type."""
    worst: dict[str, float] = {}
    for row in results["rows"]:
        if "worst_error_ratio" in row:
            worst[row["candidate"]] = max(worst.get(row["candidate"], 0.0), row["worst_error_ratio"])
    return _markdown(("candidate", "largest error, of the plain path's"), [[k, f"{v:.2f}"] for k, v in worst.items()])


def every(results: dict[str, Any]) -> str:
    """All candidates, with a fixed k and with variable counts: forward, and forward and backward."""
    header = ("shape", "routing", "candidate", "forward ms", "forward + backward ms", "TFLOP/s", "of limit")
    rows = [
        [
            row["shape"], _ROUTES[row["route"]], row["candidate"],
            f"{row['forward_ms']:.2f}", f"{row['forward_backward_ms']:.2f}",
            f"{row['tflops']:.0f}", f"{row['floor_ms'] / row['forward_backward_ms']:.0%}",
        ]
        for row in results["rows"] if "forward_backward_ms" in row and row["route"] in _ROUTES
    ]  # fmt: skip
    return _markdown(header, rows)


def figures(results: dict[str, Any]) -> str:
    """The issue's figures that compare rows with each other."""
    shapes = _by_shape(results)
    rows = [
        _even(name, column, rows)
        for name, rows in shapes.items()
        for column in dict.fromkeys(row["candidate"] for row in rows if row["kind"] == "ours")
    ]
    found = [row for row in rows if row]
    for first, second, most in (("remoe469m_E8", "remoe469m_E32", 1.15),):
        pair = [_best(shapes.get(name, []), "ours", "var") for name in (first, second)]
        if all(pair):
            ratio = pair[1]["forward_backward_ms"] / pair[0]["forward_backward_ms"]
            found.append([f"{second} over {first}", f"{ratio:.3f}", f"≤ {most}", _yes(ratio <= most)])
    found += _chunks(shapes)
    many = _best(shapes.get("remoe469m_E128", []), "ours", "var")
    if many:
        ratio = many["forward_backward_ms"] / many["floor_ms"]
        found.append(["remoe469m_E128 over its memory floor", f"{ratio:.3f}", "≤ 1.2", _yes(ratio <= 1.2)])
    return _markdown(("figure", "measured", "target", "reached"), found)


def _chunks(shapes: dict[str, list[Row]]) -> list[list[str]]:
    """The dense start in chunks: its time, and its peak beside that of the steady state."""
    names = {"stage1_182m_E8": "remoe_chunked", "remoe182m_E8": "remoe"}
    rows = [
        next((row for row in shapes.get(name, []) if row["candidate"] == column and row["route"] == "var"), None)
        for name, column in names.items()
    ]
    start, steady = rows
    if not start or "forward_backward_ms" not in start:
        return []
    found = [["stage1_182m_E8 in chunks, ms", _ms(start), "≤ 8.5", _yes(start["forward_backward_ms"] <= 8.5)]]
    if steady and steady.get("peak_bytes"):
        ratio = start["peak_bytes"] / steady["peak_bytes"]
        found.append(["its peak over the steady state's", f"{ratio:.3f}", "≤ 1.15", _yes(ratio <= 1.15)])
    return found


def _even(name: str, column: str, rows: list[Row]) -> list[str] | None:
    """Measured in turn, or where an older file lacks that, one after the other."""
    by_route = {row["route"]: row for row in rows if row["candidate"] == column and "forward_backward_ms" in row}
    if not {"even_fixed", "even_var"} <= by_route.keys():
        return None
    fixed, variable = by_route["even_fixed"], by_route["even_var"]
    ratio = variable.get("over_even_fixed", variable["forward_backward_ms"] / fixed["forward_backward_ms"])
    label = f"{name}, {column}: variable over fixed k at equal counts per expert"
    return [label, f"{ratio:.3f}", "0.97 to 1.03", _yes(0.97 <= ratio <= 1.03)]


def model(results: dict[str, Any]) -> str:
    """Training speeds, memory, MFU."""
    header = ("model", "phase", "candidate", "micro-batch", "step ms", "tokens/s", "MFU", "density", "peak GiB", "note")
    rows = [_model_row(row) for row in results["rows"] if row.get("kind") != "ratio"]
    return _markdown(header, rows)


def _model_row(row: Row) -> list[str]:
    note = row.get("error", row.get("note", row.get("experts_implementation", "")))
    note = "failed its check" if "mismatches" in row else note
    if "step_ms" not in row:
        return [row["model"], row.get("phase", ""), row.get("candidate", ""), "", "", "", "", "", "", note]
    return [
        row["model"],
        row["phase"],
        row["candidate"],
        f"{row['micro_batch']} × {row['accumulation']}",
        f"{row['step_ms']:,.0f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['mfu']:.1%}" if "mfu" in row else "",
        f"{row['density']:.4f}" if "density" in row else "",
        _size(row.get("peak_bytes")),
        note,
    ]


def ratios(results: dict[str, Any]) -> str:
    """What ReLU costs over Top-K, and ours over transformers."""
    rows = []
    for row in results["rows"]:
        if row.get("kind") == "ratio":
            rows += _ratio_rows(row)
    steady = [row for row in results["rows"] if row.get("phase") == "steady" and "tokens_per_second" in row]
    for peer in (row for row in steady if row["kind"] == "peer"):
        ours = next(row for row in steady if row["model"] == peer["model"] and row["candidate"] == "relu")
        ratio = ours["tokens_per_second"] / peer["tokens_per_second"]
        rows.append([peer["model"], f"ReLU's tokens/s over {peer['candidate']}'s", f"{ratio:.2f}", ""])
    return _markdown(("model", "figure", "measured", "target"), rows)


def _ratio_rows(row: Row) -> list[list[str]]:
    found = [("ReLU's tokens/s over Top-K's, steady state", f"{row['speed']:.3f}", "≥ 1.00")]
    if "stages_extra_time" in row:
        extra = f"{row['stages_extra_time']:.2%}"
        found.append(("extra time of Stages I and II in 60k steps, at most", extra, "≤ 0.4 %"))
    if "start_peak" in row:
        found += [
            ("peak memory of the start over ReLU's steady state", f"{row['start_peak']:.3f}", "≤ 1.15"),
            ("peak memory of the start over Top-K's", f"{row['start_peak_over_topk']:.3f}", "≤ 1.10"),
        ]
    return [[row["model"], *cells] for cells in found]


def stages(results: dict[str, Any]) -> str:
    """`stages.py`: what Stages I and II add to a run, as long as the paper's, or as recorded ones went."""
    header = ("model", "dense step ÷ steady step", f"{STAGE_STEPS} dense steps of {RUN_STEPS:,}")
    header += ("as recorded runs went", "target")
    rows = [
        [
            row["model"],
            f"{row['start_step']:.2f}",
            f"{row['paper']:.2%}",
            f"{row['runs_least']:.2%} to {row['runs_most']:.2%}",
            "≤ 0.4 %",
        ]
        for row in results["rows"]
    ]
    return _markdown(header, rows)


def layouts(results: dict[str, Any]) -> str:
    """Training on one GPU or several, beside as many times one of them; without the columns that say nothing."""
    alone = {row["router"]: row["tokens_per_second"] for row in results["rows"] if row["ranks"] == 1}
    rows = [_layout_row(row, alone.get(row["router"])) for row in results["rows"]]
    kept = [name for name in rows[0] if any(row[name] not in ("1", "1.000", "–") for row in rows)]
    return _markdown(kept, [[row[name] for name in kept] for row in rows])


def _layout_row(row: Row, alone: float | None) -> dict[str, str]:
    parallel = row["parallel"] or {}
    share = None if alone is None else row["tokens_per_second"] / alone / row["ranks"]
    return {
        "router": row["router"],
        "GPUs": str(row["ranks"]),
        "expert": str(parallel.get("expert", 1)),
        "sharded": parallel.get("sharded", "–"),
        "step ms": f"{statistics.median(row['step_ms']):,.0f}",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "of GPUs × one": "–" if share is None else f"{share:.3f}",
        "MFU": f"{row['mfu']:.1%}" if "mfu" in row else "–",
        "active experts": f"{row['active_experts']:.3f}",
        "peak GiB": _size(max(row["peak_bytes"])),
    }


def decode(results: dict[str, Any]) -> str:
    """Prefill and decoding."""
    header = ("model", "phase", "batch", "candidate", "tokens/s", "ms a token", "of limit", "note")
    rows = []
    for row in results["rows"]:
        note = row.get("error", row.get("experts_implementation", ""))
        if "tokens_per_second" not in row:
            rows.append([row["model"], "", "", row["candidate"], "", "", "", note])
            continue
        speed = row["tokens_per_second"]
        cells = [f"{speed:,.0f}", f"{row['ms_per_token']:.2f}" if "ms_per_token" in row else ""]
        share = f"{speed / row['limit_tokens_per_second']:.0%}"
        rows.append([row["model"], row["phase"], str(row["batch"]), row["candidate"], *cells, share, note])
    return _markdown(header, rows)


def kernels(results: dict[str, Any]) -> str:
    """Of each profiled row of ours that is sound and works on all rows at once: kernels of a percent or more."""
    parts = []
    for row in results["rows"]:
        is_wanted = row.get("kind", "ours") == "ours" and "profile" in row and "mismatches" not in row
        if not is_wanted or row.get("candidate") == "remoe_chunked" or row.get("route", "var") not in _ROUTES:
            continue
        lines = [
            [f"`{_kernel_name(k['kernel'])}`", str(k["calls"]), f"{k['us']:.0f}", f"{k['share']:.1%}", _rates(k)]
            for k in row["profile"]
            if k["share"] >= 0.01
        ]
        table = _markdown(("kernel", "calls", "µs", "share", "rate"), lines)
        parts.append(f"{row.get('candidate', row.get('router'))} {_profiled(row)}:\n\n{table}")
    return "\n\n".join(parts)


def _kernel_name(name: str) -> str:
    quack = re.search(r"quack\w+?(Gemm\w+?)Sm90\w+?ShapeMNK64(\d+)16_", name)
    return f"QuACK {quack[1]}, tiles of {quack[2]} columns" if quack else name[:60]


def _profiled(row: Row) -> str:
    if "ranks" in row:
        return f"on {row['ranks']} GPU{'s' * (row['ranks'] > 1)}, one optimizer step"
    if "shape" not in row:
        return f"at {row['model']}, one optimizer step"
    return f"at {row['shape']}, {'fixed k' if row['route'] == 'topk' else 'variable counts'}"


def _rates(kernel: Row) -> str:
    if kernel.get("tflops"):
        return f"{kernel['tflops']:.0f} TFLOP/s"
    return f"{kernel['gb_per_second']:.0f} GB/s" if kernel.get("gb_per_second") else ""


def layer_cpu(results: dict[str, Any]) -> str:
    """`layer_cpu.py`: medians, and speeds as medians of paired ratios."""
    times = results["milliseconds"]
    rows = [
        [name, f"{statistics.median(values):.1f}", f"{_paired(times, name, 'dense'):.2f}"]
        for name, values in times.items()
    ]
    return _markdown(("candidate", "ms", "speed, of dense"), rows)


def targets_cpu(results: dict[str, Any]) -> str:
    """What the CPU's layer should reach."""
    times = results["milliseconds"]
    rows = [[words, f"{_paired(times, row, over):.2f}"] for words, row, over, _ in CPU_TARGETS]
    rows.append(["E 8 → 64 at constant k costs < 1.7 ×", f"{_paired(times, 'topk E=8', 'topk E=64'):.2f}"])
    return _markdown(("target", "reached"), rows)


def _paired(times: dict[str, list[float]], row: str, over: str) -> float:
    return statistics.median(b / a for a, b in zip(times[row], times[over], strict=True))


def _by_shape(results: dict[str, Any]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in results["rows"]:
        if "sizes" in row:
            found.setdefault(row["shape"], []).append(row)
    return found


def _best(rows: list[Row], kind: str, route: str) -> Row | None:
    times = [row for row in rows if row["kind"] == kind and row["route"] == route and "forward_backward_ms" in row]
    return min(times, key=lambda row: row["forward_backward_ms"], default=None)


def _ms(row: Row | None) -> str:
    return f"{row['forward_backward_ms']:.2f}" if row and "forward_backward_ms" in row else "–"


def _named(row: Row | None) -> str:
    return "–" if row is None else f"{_ms(row)} {row['candidate']}"


def _gib(row: Row | None) -> list[str]:
    return ["", ""] if row is None else [_size(row.get("held_bytes")), _size(row.get("peak_bytes"))]


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "machine": machine,
    "layer": layer,
    "memory": memory,
    "errors": errors,
    "every": every,
    "figures": figures,
    "model": model,
    "ratios": ratios,
    "stages": stages,
    "layouts": layouts,
    "decode": decode,
    "kernels": kernels,
    "layer-cpu": layer_cpu,
    "targets-cpu": targets_cpu,
}

if __name__ == "__main__":
    main()
