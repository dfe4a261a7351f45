"""Text from token ids as they come, cut only where a character is whole."""

from collections.abc import Iterable, Iterator

from remoe.data.tokenizer import UNKNOWN, Tokenizer


def text_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """What each id adds to the text; bytes of a character that is not complete yet wait for the rest of it.

    Joined, the pieces are `tokenizer.decode` of all ids.
    """
    before: list[int] = []
    """The ids of the piece before: what a tokenizer puts between two tokens depends on both."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(int(token))
        shown, text = tokenizer.decode(before), tokenizer.decode(before + waiting)
        if text.endswith(UNKNOWN) or len(text) <= len(shown):
            continue
        yield text[len(shown) :]
        before, waiting = waiting, []
    if waiting:  # the text ends inside of a character, or with one that stands for what is unknown
        yield tokenizer.decode(before + waiting)[len(tokenizer.decode(before)) :]
