"""An export serves in vLLM through its transformers back-end, with the tokens of greedy native generation.

vLLM wants an older transformers than ours: install it in an environment of its own and name that interpreter in
REMOE_VLLM_PYTHON (docs/how-to/serve.md).
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from remoe.data.tokenizer import BytesTokenizer
from remoe.export import write_export
from remoe.model import ReMoEConfig, ReMoEForCausalLM

PYTHON = os.environ.get("REMOE_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="vllm is not installed; REMOE_VLLM_PYTHON names an interpreter with it"),
]

SERVE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], trust_remote_code=True, model_impl="transformers", dtype="float32", enforce_eager=True,
              max_model_len=128)
    settings = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(["Once upon", "def f(x):"], settings)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.parametrize("router", ["relu", "topk", "recurrent_relu"])
def test_vllm_writes_the_tokens_of_native_generation(tmp_path, router):
    config = ReMoEConfig(
        vocab_size=257, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, num_experts=4,
        top_k=2, init_std=0.2, router=router,
    )  # fmt: skip
    model, tokenizer = ReMoEForCausalLM(config).eval(), BytesTokenizer()
    write_export(model, tokenizer, tmp_path / "export")
    (tmp_path / "serve.py").write_text(SERVE)
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"), "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [PYTHON, str(tmp_path / "serve.py"), str(tmp_path / "export")]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    served = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOKENS"))[6:])
    for prompt, tokens in zip(("Once upon", "def f(x):"), served, strict=True):
        prompt_1S = torch.tensor([tokenizer.encode(prompt).tolist()])
        assert model.generate(prompt_1S, 12)[0, prompt_1S.shape[1] :].tolist() == tokens
