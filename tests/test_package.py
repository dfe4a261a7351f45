"""What `import remoe` gives and costs."""

import subprocess
import sys

import pytest

import remoe

EXTRAS = ["tokenizers", "pyarrow", "zstandard", "matplotlib", "transformers", "tensorboard", "wandb", "trackio"]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", remoe.__all__)
def test_every_public_name_is_there(name):
    assert getattr(remoe, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Moe'"):
        _ = remoe.Moe


def test_train_stays_a_function_whatever_was_imported():
    assert run_python("import remoe.training.config, remoe; print(remoe.train.__name__)") == "train\n"


def test_import_loads_nothing_heavy():
    loaded = run_python("import remoe, sys; print(*sys.modules)").split()
    heavy = {"transformers", "matplotlib", "pydantic", "typer", "rich", "yaml", "remoe.training", "remoe.data"}
    assert heavy.isdisjoint(loaded)


def test_core_works_with_every_extra_absent():
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
    out = run_python(
        block + "import remoe, torch\n"
        "layer = remoe.MoE(remoe.MoEConfig(hidden_size=8, intermediate_size=8))\n"
        "layer(torch.randn(1, 4, 8))[0].sum().backward()\n"
        "assert callable(remoe.train) and callable(remoe.load)\n"
        "from remoe.data import load_tokenizer; print(load_tokenizer('bytes').vocab_size)"
    )
    assert out == "257\n"
