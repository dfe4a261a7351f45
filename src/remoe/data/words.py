"""Words between white space as tokens, as WikiText-style perplexity counts them (RMoE §4.4)."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from remoe.data.tokenizer import EOD_TEXT, Ids, pieces_in, printable, write_card

UNKNOWN_WORD = "<unk>"
END_OF_LINE = "\n"


class WordTokenizer:
    """One id a word of a given vocabulary, one for the end of a line, one for all other words, and the end of document.

    White space within a line does not survive: decoding puts one space between words. A text's own `<unk>`, as in
    WikiText, is the unknown word.
    """

    name = "words"

    def __init__(self, words: Iterable[str]) -> None:
        kept = [word for word in dict.fromkeys(words) if word not in (UNKNOWN_WORD, END_OF_LINE)]
        self.words = [UNKNOWN_WORD, END_OF_LINE, *kept]
        self.unknown, self.end_of_line, self.eod = 0, 1, len(self.words)
        self.vocab_size = self.eod + 1
        self.fingerprint = hashlib.sha256(b"remoe words " + "\0".join(self.words).encode()).hexdigest()
        self._ids = {word: index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> Ids:
        """See Tokenizer; a word outside the vocabulary becomes the unknown id."""
        ids: list[int] = []
        for number, line in enumerate(text.split("\n")):
            ids += [self.end_of_line] if number else []
            ids += [self._ids.get(word, self.unknown) for word in line.split()]
        return np.array(ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        text = " ".join(self.words[i] for i in ids if i < self.eod)
        return text.replace(f" {END_OF_LINE}", END_OF_LINE).replace(f"{END_OF_LINE} ", END_OF_LINE)

    def token_text(self, token_id: int) -> str:
        """See Tokenizer."""
        return EOD_TEXT if token_id >= self.eod else printable(self.words[token_id])

    def save(self, folder: Path) -> None:
        """See Tokenizer."""
        write_card(self, folder, "words", words=self.words)


def words_of(training_files: Sequence[Path] | None, text_key: str = "text") -> WordTokenizer:
    """The tokenizer of all words in the training text, the most frequent first. DataError where there is none."""
    counts = pieces_in(training_files, text_key, "words", str.split)
    return WordTokenizer(sorted(counts, key=lambda word: (-counts[word], word)))
