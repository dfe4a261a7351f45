"""Who has which tokens of each sequence: attention sees all of them, everything else only its own."""

from torch import Tensor


def own_columns(length: int, index: int, num_ranks: int) -> slice:
    """The tokens of the index-th of so many ranks that share a sequence of this length evenly."""
    own = length // num_ranks
    return slice(index * own, (index + 1) * own)


class WholeSequence:
    """One process has all tokens: nothing is exchanged. Ranks that share sequences have a subclass each."""

    def columns(self, length: int) -> slice:
        """This process's tokens of a sequence of this length."""
        return slice(0, length)

    def gather_tokens(self, hidden_BSH: Tensor) -> Tensor:
        """Before the projections to queries, keys and values: own tokens to those that the projections need."""
        return hidden_BSH

    def tokens_to_heads(self, projected_BSX: Tensor) -> Tensor:
        """After those projections: some tokens' heads to all tokens' own heads."""
        return projected_BSX

    def heads_to_tokens(self, mixed_BSX: Tensor) -> Tensor:
        """Before the output projection: the way back."""
        return mixed_BSX

    def scatter_tokens(self, hidden_BSH: Tensor) -> Tensor:
        """After the output projection: to own tokens again."""
        return hidden_BSH


WHOLE = WholeSequence()
