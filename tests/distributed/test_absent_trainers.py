"""Adapters of trainers that are not installed say so in one line; nothing else of remoe needs them."""

import subprocess
import sys

CODE = """
import sys
sys.modules.update({"megatron": None, "torchtitan": None})
import remoe.distributed.adapters
from remoe.errors import RemoeError
for name in ("megatron", "torchtitan"):
    try:
        __import__(f"remoe.distributed.adapters.{name}")
    except RemoeError as error:
        print(error)
"""


def test_an_absent_trainer_is_one_clear_error():
    finished = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    megatron, torchtitan = finished.stdout.splitlines()
    assert megatron == "megatron-core is not installed; it comes with: pip install 'remoe[megatron]'"
    assert torchtitan.startswith("torchtitan is not installed; pip install torchtitan==0.3.0, in an environment")
