"""A short model card for an export."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remoe.training import Run

CARD = """\
# {name}

A language model trained with remoe.

- router: {router}; {total:,} parameters, {active:,} active per token
- trained on {tokens:,} tokens; validation loss {valid_loss:.4f}

```python
import remoe

model = remoe.load("{folder}")  # in eval mode; model(tokens_BS).logits
```
"""


def model_card(run: "Run", folder: Path) -> str:
    """The README.md of an export."""
    from remoe.model.size import parameter_count

    model = run.config.model
    size = parameter_count(model)
    return CARD.format(
        name=run.config.name,
        router=model.moe.router_name if model.num_moe_layers else "none (dense)",
        total=size.total,
        active=size.active,
        tokens=run.tokens,
        valid_loss=run.valid_loss,
        folder=folder.name,
    )
