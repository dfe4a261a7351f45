"""Train a model from Python, load it again, let it write, and look at how many experts each token used.

python examples/train_and_load.py [KEY=VALUE ...], for example data.train=corpus.txt train.steps=500
"""

import sys

import torch

import remoe
from remoe.recipes import read_config


def main(*overrides: str) -> None:
    """Train the recipe with its keys overridden; a run that is there already is begun anew."""
    config = read_config("demo-relu", ["name=from-python", *overrides])
    run = remoe.train(config, overwrite=True)
    print(f"{run.path}: validation loss {run.valid_loss:.4f} after {run.tokens:,} tokens")

    model = remoe.load(run.path)
    prompt = b"def "  # this recipe reads bytes, so that token ids are bytes
    tokens_BS = model.generate(torch.tensor([list(prompt)]), max_new_tokens=40)
    text = bytes(token for token in tokens_BS[0].tolist() if token < 256)
    print(text.decode(errors="replace"))

    with torch.no_grad():
        output = model(tokens_BS)
    experts_T = torch.stack([r.routing_map_TE.sum(dim=1) for r in output.routings if r is not None]).float().mean(dim=0)
    for token, experts in zip(tokens_BS[0].tolist(), experts_T.tolist(), strict=True):
        print(f"{bytes([token % 256])!r}: {experts:.2f} experts a layer")


if __name__ == "__main__":
    main(*sys.argv[1:])
