"""The parameters of a model, or of a stage's layers, by who gathers them."""

from dataclasses import dataclass

from remoe.model.config import ReMoEConfig
from remoe.model.size import parameter_count


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parameters by who gathers them: those of one layer's experts, attention and dense MLP, and all others."""

    experts: int
    attention: int
    dense: int
    root: int
    total: int

    @classmethod
    def of(cls, model: ReMoEConfig, *, has_embedding: bool = True, has_head: bool = True) -> "Parts":
        """Count a model's, or those of a stage that leaves an end of the model to others.

        The cell of recurrent routers, which all stages have, is left out for those without experts.
        """
        layers, moe_layers = model.num_layers, model.num_moe_layers
        total = parameter_count(model).total - _elsewhere(model, has_embedding, has_head)
        attention = 2 * model.hidden_size * model.head_width * (model.num_heads + model.kv_heads)
        dense = 3 * model.hidden_size * model.intermediate_size
        experts = dense * model.num_experts
        root = total - layers * attention - moe_layers * experts - (layers - moe_layers) * dense
        return cls(experts=experts, attention=attention, dense=dense, root=root, total=total)


def _elsewhere(model: ReMoEConfig, has_embedding: bool, has_head: bool) -> int:
    """Embedding, output head and what stands before it, where they are left to others; a tied embedding is at both
    ends.
    """
    tokens = model.vocab_size or 0
    lacking = (not has_embedding, not has_head)
    absent = int(all(lacking)) if model.tie_embeddings else sum(lacking)
    before_head = 0 if has_head else tokens if model.is_post_norm else model.hidden_size  # a bias, or the last norm
    return absent * tokens * model.hidden_size + before_head
