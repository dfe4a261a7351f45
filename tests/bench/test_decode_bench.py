"""Benchmarks of prefill and decoding, on a tiny model."""

import pytest
import torch

from remoe.bench import decode
from remoe.bench.chart import decode_bars
from remoe.bench.decode import DecodeBench, bench_decode
from remoe.bench.results import MismatchError
from remoe.bench.tables import console, decode_table
from remoe.model import ReMoEForCausalLM

CPU = torch.device("cpu")


def tiny_bench(run_config, **changes) -> DecodeBench:
    sizes = {"prompt": (4, 64), "batches": (1, 3), "context": 16, "new_tokens": 8, "repeats": 1}
    return DecodeBench(**({"configs": {"tiny": run_config}, "peers": [], "device": CPU} | sizes | changes))


def test_rows_are_prefill_and_each_batch_with_both_routers(run_config):
    torch.manual_seed(0)
    results = bench_decode(tiny_bench(run_config))
    results.check()
    assert [(row["phase"], row["batch"], row["candidate"]) for row in results.rows] == [
        (phase, batch, router)
        for phase, batch in (("prefill", 4), ("decode", 1), ("decode", 3))
        for router in ("relu", "topk")
    ]
    assert all(row["limit_tokens_per_second"] > 0 for row in results.rows)
    console().print(decode_table(results))


def test_bars_name_phase_and_batch(run_config):
    row = {
        "model": "tiny",
        "phase": "decode",
        "batch": 64,
        "candidate": "relu",
        "kind": "ours",
        "tokens_per_second": 50.0,
        "limit_tokens_per_second": 100.0,
    }
    bar = decode_bars([row])[0]
    assert (bar.group, bar.series, bar.share) == ("tiny\ndecode, batch 64", "remoe, ReLU", 0.5)


def test_a_decoder_that_chooses_other_tokens_is_an_error(run_config, monkeypatch):
    right = ReMoEForCausalLM.generate

    def wrong(self, tokens_BS, max_new_tokens, **options):
        text_BS = right(self, tokens_BS, max_new_tokens, **options)
        text_BS[:, tokens_BS.shape[1] :] = 0
        return text_BS

    monkeypatch.setattr(ReMoEForCausalLM, "generate", wrong)
    with pytest.raises(MismatchError, match=r"relu: a decoded token is \d\.\d+ below the best logit, allowed 0\.001"):
        bench_decode(tiny_bench(run_config)).check()


@pytest.mark.heavy
def test_a_mixtral_of_transformers_generates_beside_ours(run_config):
    pytest.importorskip("transformers")
    rows = bench_decode(tiny_bench(run_config, peers=["transformers"])).rows
    peers = [row for row in rows if row["kind"] == "peer"]
    assert [(row["phase"], row["batch"]) for row in peers] == [("prefill", 4), ("decode", 1), ("decode", 3)]
    assert decode.PEERS["transformers_static"] == "static"
