"""tokenizer.json and tokenizer_config.json for AutoTokenizer, with the ids of our own tokenizers."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from remoe.data.files import to_json, write_whole
from remoe.data.subword import SubwordTokenizer
from remoe.data.tokenizer import EOD_TEXT, UNKNOWN, BytesTokenizer, CharacterTokenizer, Tokenizer
from remoe.data.words import END_OF_LINE, UNKNOWN_WORD, WordTokenizer
from remoe.errors import DataError

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_ANY_CHARACTER = r"[\s\S]"
_NO_WORD = "\n\n"
"""What no word begins with: WordPiece's decoder joins such tokens to the one before."""


def write(tokenizer: Tokenizer, folder: Path, has_template: bool = False) -> None:
    """Write both files beside those of `tokenizer.save`. DataError for a tokenizer that transformers cannot express.

    Beside a chat template the end-of-document token is read in texts: transformers renders conversations as text.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        eod_text = tokenizer.eod_text
        if not (folder / _FILE).is_file():
            write_whole(folder / _FILE, tokenizer.library_json().encode())
    else:
        model = _model(tokenizer)
        eod_text = _free_text(EOD_TEXT, model["model"]["vocab"])
        write_whole(folder / _FILE, to_json(_EMPTY | model | {"added_tokens": [_special(tokenizer.eod, eod_text)]}))
    write_whole(folder / _CONFIG, to_json(_config(tokenizer, eod_text, has_template)))


def _config(tokenizer: Tokenizer, eod_text: str, has_template: bool) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod_text,
        "pad_token": eod_text,
        "clean_up_tokenization_spaces": False,
        # ours read "<eod>" in a text as text; the tokenizers library reads its special tokens as such
        "split_special_tokens": not (has_template or isinstance(tokenizer, SubwordTokenizer)),
    }


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    """The parts of tokenizer.json that a tokenizer decides."""
    if isinstance(tokenizer, BytesTokenizer):
        return _bytes()
    if isinstance(tokenizer, CharacterTokenizer):
        return _characters(tokenizer)
    if isinstance(tokenizer, WordTokenizer):
        return _words(tokenizer)
    raise DataError(
        f"tokenizer {tokenizer.name} has no form in transformers; those of bytes, characters, words, a tokenizer.json "
        "and gpt2 have one"
    )


def _bytes() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    model = {"type": "BPE", "byte_fallback": False, "fuse_unk": False, "vocab": vocabulary, "merges": []}
    return {"pre_tokenizer": byte_level, "decoder": byte_level, "model": model}


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def _characters(tokenizer: CharacterTokenizer) -> dict[str, Any]:
    vocabulary = {character: index for index, character in enumerate(tokenizer.characters)}
    unknown = _free_text(UNKNOWN, vocabulary)
    return {
        "pre_tokenizer": _split({"Regex": _ANY_CHARACTER}, "Isolated"),
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary | {unknown: tokenizer.unknown}, "unk_token": unknown},
    }


def _words(tokenizer: WordTokenizer) -> dict[str, Any]:
    spaces = "".join(space for space in map(chr, range(0x3001)) if space.isspace() and space != END_OF_LINE)
    line_ends, between = _split({"String": END_OF_LINE}, "Isolated"), _split({"Regex": f"[{spaces}]+"}, "Removed")
    joined = [
        {"type": "WordPiece", "prefix": _NO_WORD, "cleanup": False},
        {"type": "Fuse"},
        _replace(f" {END_OF_LINE}", END_OF_LINE),
        _replace(f"{END_OF_LINE} ", END_OF_LINE),
    ]
    vocabulary = {word: index for index, word in enumerate(tokenizer.words)}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [line_ends, between]},
        "decoder": {"type": "Sequence", "decoders": joined},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN_WORD},
    }


def _split(pattern: dict[str, str], behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _special(token_id: int, text: str) -> dict[str, Any]:
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text} | no | {"special": True}


def _free_text(text: str, vocabulary: Collection[str]) -> str:
    while text in vocabulary:
        text = f"<{text}>"
    return text


_EMPTY = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": None,
    "post_processor": None,
}
