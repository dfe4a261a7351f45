"""Text as it is generated: whole characters only, and in sum what the tokenizer makes of all ids."""

import pytest

from remoe.data.named_tokenizer import load_tokenizer
from remoe.data.text_stream import text_pieces
from remoe.data.tokenizer import BytesTokenizer

BYTES = BytesTokenizer()


def test_a_character_of_several_bytes_comes_as_one_piece():
    ids = BYTES.encode("a€😀b").tolist()
    assert list(text_pieces(BYTES, ids)) == ["a", "€", "😀", "b"]


def test_a_piece_comes_as_soon_as_its_token_is_there():
    taken = []

    def tokens():
        for token in BYTES.encode("né").tolist():
            taken.append(token)
            yield token

    pieces = text_pieces(BYTES, tokens())
    assert (next(pieces), len(taken)) == ("n", 1)
    assert (next(pieces), len(taken)) == ("é", 3)


@pytest.mark.parametrize(
    "ids", [[0xE2, 0x82], [0xFF, 0x41], [0xE2, 0xFF, 0xFF], [256, 0x41, 256], [], [0xEF, 0xBF, 0xBD]]
)
def test_pieces_join_to_the_decoded_text_also_where_bytes_are_no_text(ids):
    assert "".join(text_pieces(BYTES, ids)) == BYTES.decode(ids)


def test_pieces_of_words_have_the_spaces_between_them(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("the cat sat\non the mat\n")
    words = load_tokenizer("words", [path])
    ids = words.encode("the cat\nthe mat\n").tolist()
    assert list(text_pieces(words, ids)) == ["the", " cat", "\n", "the", " mat", "\n"]


def test_pieces_of_a_tokenizer_that_marks_the_start_of_words_keep_their_spaces(tmp_path):
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.WordLevel({"▁a": 0, "▁cat": 1, "s": 2}, unk_token="s"))
    tokenizer.decoder = library.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert list(text_pieces(loaded, [0, 1, 2, 0])) == ["a", " cat", "s", " a"]
