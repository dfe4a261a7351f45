"""benchmarks/measured.py reads files of results as jobs and layouts."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "measured.py"
spec = importlib.util.spec_from_file_location("measured", SCRIPT)
measured = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measured)


def test_a_measured_layout_is_read_with_its_sizes_and_overrides(tmp_path: Path):
    command = "benchmarks/scale_out.py remoe-469m-relu --expert 1 2 --micro-batch 4 --accumulation 3"
    command += " --compile --set data.sequence_length=512 --output x.json"
    parallel = {"data_replicate": 1, "data_shard": 2, "expert": 2, "tensor": 1, "context": 1, "timeout": 600.0}
    rows = [
        {"router": "topk", "ranks": 1, "parallel": None, "tokens_per_second": 10.0, "peak_bytes": [5]},
        {
            "router": "topk",
            "ranks": 2,
            "parallel": parallel | {"sharded": "optimizer"},
            "tokens_per_second": 18.0,
            "peak_bytes": [5, 7],
        },
        {
            "router": "topk",
            "ranks": 2,
            "parallel": parallel | {"data_shard": 1, "expert": 1, "pipeline": 2},
            "tokens_per_second": 1.0,
            "peak_bytes": [1],
        },
    ]
    content = {"machine": {"command": command, "gpus": ["a card", "a card"], "date": "2026-11-29"}, "rows": rows}
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "scale_out_469m.json").write_text(json.dumps(content))
    alone, two, stages = measured.measured_layouts(tmp_path)
    assert [row.what for row in (alone, two, stages)] == [
        "topk on 1",
        "topk on 2, expert 2, optimizer shared",
        "topk on 2, pipeline 2",
    ]
    assert (two.parallel.sharded, stages.parallel.sharded) == ("optimizer", "parameters")
    assert two.job.is_compiled
    assert (two.job.batch_size, two.job.micro_batch_size, two.job.sequence_length) == (4 * 3 * 2, 4, 512)
    assert (alone.job.batch_size, alone.parallel.shards) == (12, 1)
    assert two.job.model.moe.router_name == "topk"
    assert (two.parallel.expert, two.parallel.shards, two.peak_bytes, two.gpu) == (2, 2, 7, "a card")
    assert (stages.parallel.pipeline, stages.parallel.shards, stages.peak_bytes) == (2, 1, 1)
    assert two.predicted().tokens_per_second > alone.predicted().tokens_per_second


def test_measured_models_are_the_steps_of_ours(tmp_path: Path):
    row = {"model": "remoe-182m-relu", "kind": "ours", "phase": "steady", "candidate": "relu", "micro_batch": 8}
    row |= {"accumulation": 2, "tokens_per_second": 9.0, "peak_bytes": 3}
    others = [row | {"phase": "start"}, row | {"kind": "peer"}, {"kind": "ratio"}]
    command = "python3 -m remoe bench model remoe-182m-relu --set train.activation_checkpointing=false --steps 4"
    (tmp_path / "gpu").mkdir()
    content = {"command": command, "gpus": ["a card"], "date": "2026-11-29", "rows": [row, *others]}
    (tmp_path / "gpu" / "model_182m.json").write_text(json.dumps(content))
    found, at_start = measured.measured_models(tmp_path)
    assert (found.at_start, at_start.at_start) == (False, True)
    assert found.job.is_compiled
    assert (found.job.batch_size, found.job.micro_batch_size) == (16, 8)
    assert found.job.activation_checkpointing == "none"
