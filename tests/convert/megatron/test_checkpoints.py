"""Megatron checkpoints of every layout become the model that they were made from, and nothing in them is run."""

import contextlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import remoe
from remoe.convert.megatron import convert_megatron, from_megatron
from remoe.convert.megatron.inert import MetadataUnpickler, StandIn
from remoe.errors import CheckpointError, ConfigError
from tests.convert.megatron.checkpoints import (
    ONE_RANK,
    Sizes,
    arguments,
    as_megatron,
    save_ranks,
    save_torch_dist,
    small_model,
    split,
)

LAYOUTS = {
    "one rank": Sizes(),
    "tensor parallel": Sizes(tensor=2),
    "expert parallel": Sizes(expert=2),
    "pipeline": Sizes(pipeline=2),
    "virtual pipeline": Sizes(pipeline=2, chunks=2),
    "all of them": Sizes(tensor=2, pipeline=2, expert=2, chunks=2),
}
EXPERTS = ("sequential", "grouped", "transformer engine")


def assert_same(found: Any, model: Any) -> None:
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def saved(folder: Path, model: Any, sizes: Sizes = ONE_RANK, experts: str = "grouped", **changes: Any) -> Path:
    ranks = split(as_megatron(model), sizes, model.config.num_layers, experts)
    return save_ranks(folder, ranks, arguments(model.config, sizes, **changes))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_of_all_ranks_are_one_model(tmp_path: Path, layout: str, experts: str):
    model = small_model()
    converted = from_megatron(saved(tmp_path, model, LAYOUTS[layout], experts))
    assert_same(converted.model, model)
    assert converted.model.config == model.config
    assert (converted.sparsity_coef, converted.iteration) == (0.25, 5)


@pytest.mark.parametrize(
    "changes",
    [{"granularity": 2}, {"num_kv_heads": 4}, {"head_size": 8}, {"moe_layers": [1, 3]}, {"moe_layers": "none"}],
)
def test_the_config_follows_from_arguments_and_shapes(tmp_path: Path, changes: dict[str, Any]):
    model = small_model(**changes)
    found = from_megatron(saved(tmp_path, model, Sizes(tensor=2))).model
    assert_same(found, model)
    assert found.config.head_width == model.config.head_width
    if changes != {"moe_layers": "none"}:
        assert found.config.moe == model.config.moe


@pytest.mark.parametrize("moe_layers", ["all", [0, 2]])
def test_torch_dist_is_read_too(tmp_path: Path, moe_layers: Any):
    model = small_model(moe_layers=moe_layers)
    whole = as_megatron(model)
    folder = tmp_path / "iter_0000005"
    converted = from_megatron(save_torch_dist(folder, whole, arguments(model.config)))
    assert_same(converted.model, model)
    assert (converted.sparsity_coef, converted.iteration) == (0.25, 5)


@pytest.mark.parametrize(("pre_softmax", "renormalize"), [(True, False), (False, True)])
def test_their_top_k_baseline_is_a_top_k_model(tmp_path: Path, pre_softmax: bool, renormalize: bool):
    model = small_model(router="topk")
    folder = saved(tmp_path, model, moe_relu_routing=False, moe_router_pre_softmax=pre_softmax)
    found = from_megatron(folder).model
    assert found.config.router == {"name": "topk", "renormalize": renormalize}
    assert_same(found, model)


def test_the_written_folder_loads_like_any_other(tmp_path: Path):
    model = small_model()
    convert_megatron(saved(tmp_path / "megatron", model, Sizes(tensor=2)), tmp_path / "remoe")
    tokens_BS = torch.arange(16).view(2, 8)
    loaded = remoe.load(tmp_path / "remoe")
    torch.testing.assert_close(loaded(tokens_BS).logits, model.eval()(tokens_BS).logits)


def command_line(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "remoe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.heavy
@pytest.mark.slow
def test_the_command_line_takes_it_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = small_model(vocab_size=320)  # padded, as Megatron pads: the tokenizer has 257 ids
    folder, own, export = saved(tmp_path / "megatron", model), tmp_path / "remoe", tmp_path / "export"
    converted = command_line("convert", folder, "--from", "megatron", "--to", own, "--tokenizer", "bytes")
    assert converted.returncode == 0, converted.stderr
    assert "iteration 5, 4 layers, router relu, 4 experts of which 1 a token" in " ".join(converted.stdout.split())
    finished = command_line("export", own, "--to", export)
    assert finished.returncode == 0, finished.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    tokens_BS = torch.arange(16).view(2, 8)
    torch.testing.assert_close(theirs(tokens_BS).logits, model.eval()(tokens_BS).logits, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_with_more_ids_than_the_model_is_an_error(tmp_path: Path):
    folder = saved(tmp_path / "megatron", small_model())
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 64, must be at least 257"):
        convert_megatron(folder, tmp_path / "remoe", tokenizer="bytes")
    assert not (tmp_path / "remoe").exists()


def test_bf16_weights_stay_bf16(tmp_path: Path):
    model = small_model().bfloat16()
    assert_same(from_megatron(saved(tmp_path, model)).model, model)


class Attack:
    """Runs a command where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


class Evaluation(Attack):
    """Runs Python where it is unpickled."""

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.proof)!r}, 'w')",)


@pytest.mark.parametrize("attack", [Attack, Evaluation])
@pytest.mark.parametrize("place", ["a rank's file", "common.pt", ".metadata"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, place: str, attack: type[Attack]):
    model, proof = small_model(), tmp_path / "proof"
    pickle.loads(pickle.dumps(attack(proof)))
    assert proof.exists(), "the attack works where pickle is trusted"
    proof.unlink()
    if place == "a rank's file":
        folder = saved(tmp_path, model, attack=attack(proof))
    else:
        folder = save_torch_dist(tmp_path / "iter_0000005", as_megatron(model), arguments(model.config))
        with (folder / place).open("wb") as file:
            torch.save({"args": attack(proof)}, file) if place == "common.pt" else pickle.dump(attack(proof), file)
    with contextlib.suppress(CheckpointError):  # a harmless object beside the weights does not spoil them
        from_megatron(folder)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.filesystem", "Path"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    ],
)
def test_an_index_gets_no_more_than_records(module: str, name: str):
    found = MetadataUnpickler(io.BytesIO()).find_class(module, name)
    assert issubclass(found, StandIn)


def test_a_tensor_that_has_no_place_is_an_error(tmp_path: Path):
    model = small_model()
    ranks = split(as_megatron(model), Sizes(), 4)
    ranks[0, 0, 0][0]["decoder.layers.0.self_attention.q_layernorm.weight"] = torch.ones(4)
    folder = save_ranks(tmp_path, ranks, arguments(model.config))
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0\.self_attention\.q_layernorm.*no place"):
        from_megatron(folder)


@pytest.mark.parametrize(
    "ending", ["pre_mlp_layernorm.weight", "local_experts.2.linear_fc1.weight", "linear_qkv.weight"]
)
def test_a_tensor_that_is_missing_is_an_error(tmp_path: Path, ending: str):
    model = small_model()
    ranks = split(as_megatron(model), Sizes(), 4)
    del ranks[0, 0, 0][0][next(name for name in ranks[0, 0, 0][0] if name.endswith(ending))]
    folder = save_ranks(tmp_path, ranks, arguments(model.config))
    with pytest.raises(CheckpointError, match=r"has nothing for|some are missing"):
        from_megatron(folder)


def test_a_missing_rank_is_an_error(tmp_path: Path):
    model = small_model()
    folder = saved(tmp_path, model, Sizes(tensor=2, expert=2))
    (folder / "iter_0000005" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="files of 3 ranks, must have 4"):
        from_megatron(folder)


@pytest.mark.parametrize("sizes", [Sizes(tensor=2), Sizes(expert=2)])
def test_copies_that_should_be_equal_and_are_not_are_an_error(tmp_path: Path, sizes: Sizes):
    model = small_model()
    ranks = split({name: tensor.clone() for name, tensor in as_megatron(model).items()}, sizes, 4)
    last = ranks[max(ranks)][0]
    last["decoder.layers.1.mlp.router.weight"] = last["decoder.layers.1.mlp.router.weight"] + 1
    folder = save_ranks(tmp_path, ranks, arguments(model.config, sizes))
    with pytest.raises(CheckpointError, match=r"different copies of 'decoder\.layers\.1\.mlp\.router\.weight'"):
        from_megatron(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm', must be 'RMSNorm'"),
        ({"add_bias_linear": True}, "add_bias_linear = True"),
        ({"rotary_percent": 0.5}, r"rotary_percent = 0\.5"),
        ({"num_attention_heads": 8, "kv_channels": 2}, "linear_qkv has 32 rows, must be"),
        ({"num_attention_heads": None}, "do not say num_attention_heads"),
        ({"moe_router_topk": 9}, "top_k is 9"),
        ({"expert_tensor_parallel_size": 4}, "expert_tensor_parallel_size 4"),
    ],
)
def test_a_model_that_ours_is_not_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str):
    folder = saved(tmp_path, small_model(), **changes)
    with pytest.raises(CheckpointError, match=message):
        from_megatron(folder)


@pytest.mark.parametrize("content", [b"", b"no zip file", None])
def test_what_is_no_checkpoint_is_an_error(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "mp_rank_00").mkdir()
        (tmp_path / "mp_rank_00" / "model_optim_rng.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read|holds neither"):
        from_megatron(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        from_megatron(tmp_path / "absent")


def test_a_damaged_data_file_is_an_error(tmp_path: Path):
    model = small_model()
    folder = save_torch_dist(tmp_path / "iter_0000005", as_megatron(model), arguments(model.config))
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or not complete"):
        from_megatron(folder)


@pytest.mark.slow
def test_reading_needs_no_megatron(tmp_path: Path):
    folder = saved(tmp_path, small_model())
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from pathlib import Path; from remoe.convert.megatron import from_megatron\n"
        f"print(from_megatron(Path({str(folder)!r})).iteration)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "5\n", result.stderr
