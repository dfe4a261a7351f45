"""How much text a batch's labels stand for: bytes and characters, so that tokenizers compare."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remoe.data import Batch, Tokenizer
from remoe.data.sampler import NO_LABEL


class TextSize(NamedTuple):
    """UTF-8 bytes and characters."""

    num_bytes: int = 0
    num_characters: int = 0

    def plus(self, other: "TextSize") -> "TextSize":
        """Both together."""
        return TextSize(self.num_bytes + other.num_bytes, self.num_characters + other.num_characters)


def sizes_by_domain(batch: Batch, domains: Sequence[str], tokenizer: Tokenizer) -> dict[str, TextSize]:
    """The text behind the labels of each domain. End-of-document labels are no text."""
    sizes: dict[str, TextSize] = {}
    for labels_S, domain_S in zip(batch.labels_BS.numpy(), batch.domain_BS.numpy(), strict=True):
        for index in map(int, np.unique(domain_S)):
            ids = labels_S[(domain_S == index) & (labels_S != NO_LABEL)]
            name = domains[index]
            sizes[name] = sizes.get(name, TextSize()).plus(text_size(ids, tokenizer))
    return sizes


def text_size(ids: NDArray[np.int64], tokenizer: Tokenizer) -> TextSize:
    """Bytes and characters of some token ids; a character cut at either end counts where it starts."""
    if tokenizer.name == "bytes":
        codes = ids[ids != tokenizer.eod]
        continues = (codes & 0b1100_0000) == 0b1000_0000
        return TextSize(len(codes), int((~continues).sum()))
    text = tokenizer.decode(ids)
    return TextSize(len(text.encode("utf-8", errors="replace")), len(text))
