"""An export loads in transformers where remoe is not installed and there is no network."""

import json
import os
import subprocess
import sys

import pytest
import torch

from remoe.data.tokenizer import BytesTokenizer
from remoe.export import transformers_files, write_export
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from tests.model.conftest import SMALL

pytestmark = pytest.mark.heavy
pytest.importorskip("transformers", reason="transformers is not installed")

WITHOUT_REMOE = """
import json, sys
sys.modules["remoe"] = None  # importing it fails
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert not any(name.startswith("remoe") for name in sys.modules if sys.modules[name] is not None)
prompt = tokenizer("Once upon", return_tensors="pt")
logits = model(**prompt).logits
generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
assert again(**prompt).logits.equal(logits)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert model.lm_head(base(**prompt).last_hidden_state).equal(logits)
torch.save({"logits": logits.detach(), "generated": generated}, folder + "/out.pt")
"""


@pytest.mark.parametrize("router", ["relu", {"name": "recurrent_relu", "state_size": 16}])
def test_it_computes_and_generates_the_same_without_remoe_and_without_network(tmp_path, router):
    model = ReMoEForCausalLM(ReMoEConfig(**SMALL | {"vocab_size": 257, "router": router})).eval()
    tokenizer = BytesTokenizer()
    folder = tmp_path / "export"
    write_export(model, tokenizer, folder, max_shard_bytes=50_000)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_REMOE, str(folder)]
    outcome = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    result = torch.load(folder / "out.pt")
    tokens_BS = torch.tensor([tokenizer.encode("Once upon").tolist()])
    torch.set_num_threads(1)
    with torch.no_grad():
        assert result["logits"].equal(model(tokens_BS).logits)
    expected = model.generate(tokens_BS, 12, stop_tokens=(tokenizer.eod,))
    assert result["generated"].equal(expected)


FROM_THE_HUB = """
import shutil, sys
sys.modules["remoe"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub

class Repository:  # what an upload asks of the hub
    def __init__(self): self.files = {}
    def create_repo(self, repo_id, **_): return self
    repo_id = "me/again"
    def create_commit(self, operations, **_):
        self.files |= {operation.path_in_repo: operation.path_or_fileobj for operation in operations}

prompt = torch.arange(10)[None]
model = AutoModelForCausalLM.from_pretrained("me/story", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/story", trust_remote_code=True)
logits = model(prompt).logits
hub._hf_api = repository = Repository()
model.push_to_hub("me/again")
tokenizer.push_to_hub("me/again")
print(*sorted(repository.files))
hub._hf_api = None
model.save_pretrained("again")
tokenizer.save_pretrained("again")
shutil.rmtree(sys.argv[1])  # what is saved needs the repository no more
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
assert again(prompt).logits.equal(logits)
assert AutoTokenizer.from_pretrained("again", trust_remote_code=True)("Once").input_ids == [79, 110, 99, 101]
"""


def test_a_model_of_the_hub_is_saved_and_pushed_elsewhere_with_its_code(tmp_path):
    home, commit = tmp_path / "home", "a" * 40
    repository = home / "hub" / "models--me--story"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    model = ReMoEForCausalLM(ReMoEConfig(**SMALL | {"vocab_size": 257}))
    write_export(model, BytesTokenizer(), repository / "snapshots" / commit)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FROM_THE_HUB, str(repository)]
    outcome = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    pushed = set(outcome.stdout.split())
    assert pushed >= {"config.json", "model.safetensors", "modeling_remoe.py", "tokenizer.json"}
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert auto_map == transformers_files.AUTO_MAP


def test_a_pipeline_writes_the_text_of_native_generation(tmp_path):
    import transformers

    model, tokenizer = ReMoEForCausalLM(ReMoEConfig(**SMALL | {"vocab_size": 257})).eval(), BytesTokenizer()
    write_export(model, tokenizer, tmp_path)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path), trust_remote_code=True)
    text = pipeline("Once upon", max_new_tokens=9, do_sample=False)[0]["generated_text"]
    tokens_BS = torch.tensor([tokenizer.encode("Once upon").tolist()])
    expected = model.generate(tokens_BS, 9, stop_tokens=(tokenizer.eod,))
    assert text == tokenizer.decode(expected[0].tolist())


def test_the_settings_that_are_written_are_those_of_the_classes():
    from remoe.hf import modeling_remoe

    assert transformers_files.AUTO_MAP == modeling_remoe.AUTO_MAP
    assert tuple(modeling_remoe.ROUTER_OPTIONS) == transformers_files.ROUTERS


def test_a_model_that_transformers_does_not_have_is_written_without_remote_code(tmp_path):
    config = ReMoEConfig(**SMALL | {"vocab_size": 257, "router": "hash"})
    for settings in (SMALL | {"vocab_size": 257}, SMALL | {"vocab_size": 257, "router": "hash"}):
        write_export(ReMoEForCausalLM(ReMoEConfig(**settings)), BytesTokenizer(), tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "modeling_remoe.py").exists()
    assert "must be one of relu, topk" in transformers_files.missing_in_transformers(config)
    assert "With remoe alone: router is 'hash'" in (tmp_path / "README.md").read_text()
