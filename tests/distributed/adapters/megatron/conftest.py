"""One process with Megatron's groups, for the tests of a file."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    from tests.distributed.adapters.megatron import models

    models.single_process()
    try:
        with models.megatron_on_cpu():
            yield
    finally:
        dist.destroy_process_group()
