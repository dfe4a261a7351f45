"""The Python of docs/how-to/megatron.md, executed as written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra megatron")

from tests.convert.megatron.checkpoints import arguments, as_megatron, save_torch_dist, small_model
from tests.distributed.adapters.megatron.models import LENGTH, VOCABULARY, megatron_config, tokens, train_micro_batch

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("megatron")]
PAGE = (Path(__file__).resolve().parents[4] / "docs" / "how-to" / "megatron.md").read_text(encoding="utf-8")
BUILD, STEP, STATE, CONVERT = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


class Optimizer:
    """Says what Megatron's says after a step that went well."""

    def step(self) -> tuple[bool, float, int]:
        return True, 1.0, 0


def test_a_step_of_the_page_moves_the_coefficient():
    names: dict[str, Any] = {
        "config": megatron_config(params_dtype=torch.float32),
        "vocab_size": VOCABULARY,
        "sequence_length": LENGTH,
        "use_transformer_engine": False,
        "optimizer": Optimizer(),
    }
    exec(BUILD, names)
    train_micro_batch(names["model"], tokens())
    exec(STEP, names)
    exec(STATE, names)
    assert float(names["routers"].coef) == pytest.approx(1.2e-8)
    assert names["metrics"].keys() == {"sparsity", "layer_sparsity", "sparsity_coef"}


def test_its_conversion_writes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model = small_model(vocab_size=320)
    save_torch_dist(tmp_path / "logs" / "remoe-182m", as_megatron(model), arguments(model.config))
    names: dict[str, Any] = {}
    exec(CONVERT.replace("gpt2:gpt2", "bytes"), names)
    assert names["converted"].iteration == 5
    assert (tmp_path / "remoe-182m" / "model.safetensors").is_file()
