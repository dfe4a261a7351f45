"""The MoE layer in a torch model of your own: a tiny language model whose feed-forward layers route by ReLU.

python examples/moe_layer.py [STEPS]
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe import MoE, MoEConfig, Routing, SparsityController, losses

EXPERTS, TOP_K = 8, 1
TEXT = "the quick brown fox jumps over the lazy dog while five boxing wizards pack my box with liquor jugs. " * 50


class Block(nn.Module):
    """Attention as it comes with torch; the MoE layer stands where the feed-forward layer was."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        config = MoEConfig(hidden_size=width, intermediate_size=2 * width, num_experts=EXPERTS, top_k=TOP_K)
        self.moe = MoE(config)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Routing]:
        normed = self.norm_1(hidden)
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
        hidden = hidden + self.attention(normed, normed, normed, attn_mask=mask, is_causal=True, need_weights=False)[0]
        out, routing = self.moe(self.norm_2(hidden))  # routing: gate values, routing map and logits of each token
        return hidden + out, routing


class Model(nn.Module):
    """Bytes in, logits of the next byte out, and what each layer's router decided."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        hidden, routings = self.embedding(tokens), []
        for block in self.blocks:
            hidden, routing = block(hidden)
            routings.append(routing)
        return self.head(hidden), routings


def main(steps: int = 300) -> None:
    """Train on random pieces of the text; the controller steers the average to TOP_K experts a token."""
    torch.manual_seed(0)
    text = torch.tensor(list(TEXT.encode()))
    model = Model()
    controller = SparsityController(top_k=TOP_K, num_experts=EXPERTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        pieces = text[torch.randint(len(text) - 65, (8, 1)) + torch.arange(65)]
        logits, routings = model(pieces[:, :-1])
        lm_loss = F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
        l1 = torch.stack([losses.sparsity_l1(routing, TOP_K) for routing in routings]).mean()
        (lm_loss + controller.coef * l1).backward()
        optimizer.step()
        optimizer.zero_grad()
        active = torch.stack([routing.routing_map_TE.sum() for routing in routings]).sum()
        total = sum(routing.routing_map_TE.numel() for routing in routings)
        controller.update(active, total)  # once a step, with the counts of all layers
        if step % 50 == 0 or step == steps:
            experts = EXPERTS * active.item() / total
            print(f"step {step}: loss {lm_loss.item():.3f}, {experts:.2f} experts a token, coef {controller.coef:.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
