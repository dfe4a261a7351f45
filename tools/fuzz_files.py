#!/usr/bin/env python3
"""Damage files of every kind that we read: each must be refused with one message, or mean what is still in it.

    python tools/fuzz_files.py --count 2000 --seed 0 --output results/fuzz_files.json

A target is a small file, or a folder of them, and a way to use it. One file of it is changed at random (bits, bytes,
cuts, repeated and foreign parts, numbers in text, brackets without end) and used again. Where checksums cover the
content, the result must be that of the untouched files; elsewhere what an independent reader makes of the changed file,
and where that one fails, an error. The exit code is 1 for any other end: a traceback, a hang, a wrong silent result.
"""

import argparse
import contextlib
import gzip
import io
import json
import lzma
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow
import pyarrow.parquet
import tokenizers
import torch
import yaml
import zstandard

from remoe.cli.failures import exit_code_of
from remoe.config import from_dict, to_dict
from remoe.data.named_tokenizer import load_saved_tokenizer, load_tokenizer
from remoe.data.prepare import PrepareConfig, prepare
from remoe.data.prepared import open_prefix
from remoe.data.readers import ReadConfig, read_documents
from remoe.data.tokenizer import BytesTokenizer, CharacterTokenizer, Tokenizer
from remoe.data.words import WordTokenizer
from remoe.model.weights import load_model, save_model
from remoe.training import TrainConfig, checkpoint, load, train
from remoe.training.metrics import cut_back
from remoe.training.run import Run

if __package__:
    from tools.fuzz_configs import BASE, MAX_SECONDS, limited, write_text
else:
    from fuzz_configs import BASE, MAX_SECONDS, limited, write_text

SAME, READ, REFUSED = "same result", "what an independent reader finds", "refused with one message, exit code 2"
SAMPLE = "one two three four five, 6 7 8\nnine ten\n"
Documents = list[tuple[str, str]]


class Target(NamedTuple):
    """`make` writes untouched files into a folder; `use` gives what we make of a folder's; `other` what an independent
    reader does, None: checksums cover the content. `pattern`: the files to damage.
    """

    make: Callable[[Path], None]
    use: Callable[[Path], Any]
    other: Callable[[Path], Any] | None
    pattern: str = "**/*"


def main() -> int:
    """Run the campaign; 0 if every file ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="files to damage, over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--output", type=Path, help="JSON with the counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = campaign(arguments.count, arguments.seed, Path(folder), arguments.targets)
    print(json.dumps(results, indent=1, ensure_ascii=False))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(bool(results["faults"]))


def campaign(count: int, seed: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Damage `count` files in a folder, the targets in turn; how many ended how, and every kind of fault once."""
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in names}
    faults: dict[str, str] = {}
    untouched = {name: folder / "untouched" / name for name in names}
    for name, path in untouched.items():
        path.mkdir(parents=True)
        TARGETS[name].make(path)
    results = {name: TARGETS[name].use(copied(path, folder / "damaged")) for name, path in untouched.items()}
    for number in range(count):
        name = names[number % len(names)]
        damaged = copied(untouched[name], folder / "damaged")
        what = damage(random.Random(f"{seed} {number}"), damaged, TARGETS[name].pattern)
        with limited(MAX_SECONDS):
            outcome = outcome_of(TARGETS[name], damaged, results[name])
        is_fault = outcome not in (SAME, READ, REFUSED)
        outcomes[name]["fault" if is_fault else outcome] += 1
        if is_fault:
            faults.setdefault(f"{name}: {outcome}", f"number {number}: {what}")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pyarrow": pyarrow.__version__}
    about = {"date": datetime.now(UTC).date().isoformat(), "seed": seed, "versions": versions}
    totals = sum(outcomes.values(), Counter[str]())
    return about | {"files": totals.total(), "outcomes": totals, "by_target": outcomes, "faults": faults}


def outcome_of(target: Target, folder: Path, untouched: Any) -> str:
    """How the use of a damaged file ends; anything but SAME, READ and REFUSED is a fault."""
    expected = expected_of(target, folder, untouched)
    errors, found = io.StringIO(), []
    try:
        with contextlib.redirect_stderr(errors):
            code = exit_code_of(lambda: found.append(target.use(folder)))
    except Exception as error:  # noqa: BLE001  any of them is a fault of the program
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(at.filename).name}:{at.lineno}: {str(error)[:150]}"
    if code == 2:
        return REFUSED if errors.getvalue().strip().count("\n") == 0 else f"several lines: {errors.getvalue()[:200]}"
    if found[0] == untouched:
        return SAME
    return READ if expected == found else "a wrong result, silently"


def expected_of(target: Target, folder: Path, untouched: Any) -> list[Any]:
    """The one result that is right beside an error; none where only an error is."""
    if target.other is None:
        return [untouched]
    try:
        return [target.other(folder)]
    except Exception:  # noqa: BLE001  the independent reader cannot read it
        return []


def copied(source: Path, to: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(source, to))


def damage(draw: random.Random, folder: Path, pattern: str) -> str:
    """Change one file of a folder; says how."""
    path = draw.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
    change = draw.choice(CHANGES)
    content = path.read_bytes()
    path.write_bytes(change(draw, content) if content else b"\0")
    return f"{change.__name__} {path.relative_to(folder)}"


def flip_bits(draw: random.Random, content: bytes) -> bytes:
    """One to four bits the other way round."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_early_bit(draw: random.Random, content: bytes) -> bytes:
    """A bit of the first hundred bytes, where headers are."""
    changed = bytearray(content)
    changed[draw.randrange(min(100, len(changed)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def change_late_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bytes among the last hundred, where footers are."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        changed[-draw.randint(1, min(100, len(changed)))] = draw.randrange(256)
    return bytes(changed)


def truncate(draw: random.Random, content: bytes) -> bytes:
    """The beginning alone."""
    return content[: draw.randrange(len(content))]


def extend(draw: random.Random, content: bytes) -> bytes:
    """Something after the end."""
    return content + draw.choice((b"\0", b"x", b"\n", content, draw.randbytes(draw.randint(1, 64))))


def remove(draw: random.Random, content: bytes) -> bytes:
    """A part less."""
    start, end = part(draw, content)
    return content[:start] + content[end:]


def repeat(draw: random.Random, content: bytes) -> bytes:
    """A part twice."""
    start, end = part(draw, content)
    return content[:end] + content[start:]


def overwrite(draw: random.Random, content: bytes) -> bytes:
    """A part of zeros, as a lost block of a disk, or of anything."""
    start, end = part(draw, content)
    return content[:start] + draw.choice((bytes(end - start), draw.randbytes(end - start))) + content[end:]


def change_number(draw: random.Random, content: bytes) -> bytes:
    """Another number in text."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content[: 1 << 16]))
    if not found:
        return flip_bits(draw, content)
    match = draw.choice(found)
    number = draw.choice((b"0", b"-1", b"1", b"7", b"1e999", b"NaN", b"99999999999999999999", b'"x"', b"null", b"[]"))
    return content[: match.start()] + number + content[match.end() :]


def nest(draw: random.Random, content: bytes) -> bytes:
    """Brackets without end."""
    return draw.choice((b"[", b'{"a":', b'{"text": [')) * 5000 + draw.choice((b"", content))


CHANGES = (
    flip_bits, flip_bits, flip_early_bit, change_late_bytes, truncate, extend, remove, repeat, overwrite, change_number,
    change_number, nest,
)  # fmt: skip


def part(draw: random.Random, content: bytes) -> tuple[int, int]:
    """Where a part of up to 256 bytes starts and ends."""
    start = draw.randrange(len(content))
    return start, min(len(content), start + draw.randint(1, 256))


# Text: what an independent reader makes of it


def rows() -> list[dict[str, Any]]:
    """A few documents."""
    domains = ("a", "b")
    return [{"text": f"{SAMPLE}{i} é", "meta": {"pile_set_name": domains[i % 2]}} for i in range(30)]


def lines() -> bytes:
    """The documents as jsonl."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()).encode()


def our_documents(path: Path) -> Documents:
    """What we read."""
    return [(document.text, document.domain) for document in read_documents(path, ReadConfig())]


def our_text(path: Path) -> str:
    """A text file's documents are its pieces."""
    return "".join(text for text, _ in our_documents(path))


def text_in(content: bytes) -> str:
    """A text file's content."""
    return non_empty(content).removeprefix(b"\xef\xbb\xbf").decode()


def documents_in(content: bytes) -> Documents:
    """The documents of a jsonl file's content."""
    texts = non_empty(content).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [found for text in texts if text and not text.isspace() for found in document_of(json.loads(text.decode()))]


def documents_of_parquet(path: Path) -> Documents:
    """The documents of a parquet file."""
    return [found for row in pyarrow.parquet.read_table(path).to_pylist() for found in document_of(row)]


def document_of(row: dict[str, Any]) -> Documents:
    """A row's document, unless it is empty."""
    row = {key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()}
    row["text"].encode()  # fails for what is no Unicode text
    meta = row.get("meta")
    domain = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return [(row["text"], domain if isinstance(domain, str) and domain else "text")] if row["text"] else []


def non_empty(content: bytes) -> bytes:
    """The content; an empty file is no text."""
    if not content:
        raise ValueError("empty")
    return content


def unzstd(content: bytes) -> bytes:
    """All frames, each whole."""
    plain = b""
    while content:
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        plain += frame.decompress(content)
        if not frame.eof:
            raise ValueError("cut off")
        content = frame.unused_data
    return plain


def text_target(ending: str, compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]) -> Target:
    """A corpus of one file."""
    name, is_text = f"corpus{ending}", ending.startswith(".txt")
    return Target(
        make=lambda folder: (folder / name).write_bytes(compress(SAMPLE.encode() * 9 if is_text else lines())) and None,
        use=lambda folder: (our_text if is_text else our_documents)(folder / name),
        other=lambda folder: (text_in if is_text else documents_in)(decompress((folder / name).read_bytes())),
    )


def make_parquet(folder: Path) -> None:
    """A parquet corpus."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), folder / "corpus.parquet")


# What we write ourselves


def make_dataset(folder: Path) -> None:
    """A prepared dataset."""
    (folder.parent / "rows.jsonl").write_bytes(lines())
    prepare([folder.parent / "rows.jsonl"], "bytes", folder / "data", PrepareConfig(show_progress=False))


def use_dataset(folder: Path) -> Any:
    """Every document's tokens and domain."""
    dataset = open_prefix(folder / "data", BytesTokenizer())
    names = [dataset.domains[index] for index in dataset.domain_of_document]
    return [(dataset.document(index).tolist(), name) for index, name in enumerate(names)]


def make_tokenizer(kind: str) -> Callable[[Path], None]:
    """A tokenizer as a run keeps it."""

    def make(folder: Path) -> None:
        known: dict[str, Callable[[], Tokenizer]] = {
            "characters": lambda: CharacterTokenizer(SAMPLE),
            "words": lambda: WordTokenizer(SAMPLE.split()),
            "json": lambda: load_tokenizer(str(write_bpe(folder / "tokenizer.json"))),
        }
        known[kind]().save(folder)

    return make


def write_bpe(path: Path) -> Path:
    """A tokenizer.json."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    library.train_from_iterator([SAMPLE], trainer)
    library.save(str(path))
    return path


def use_tokenizer(tokenizer: Tokenizer) -> Any:
    """What it does to a text."""
    ids = tokenizer.encode(SAMPLE).tolist()
    return ids, tokenizer.decode(ids), tokenizer.eod, tokenizer.vocab_size


def library_tokens(folder: Path) -> Any:
    """The same by the library alone; the rest follows from its vocabulary."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = library.get_vocab(with_added_tokens=True)
    free = max(vocabulary.values(), default=-1) + 1
    eod = next((vocabulary[name] for name in EOD_NAMES if name in vocabulary), free)
    ids = library.encode(SAMPLE, add_special_tokens=False).ids
    text = library.decode([i for i in ids if i != eod], skip_special_tokens=False)
    return ids, text, eod, max(free, eod + 1)


EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>", "[EOS]", "[SEP]")


def make_run(folder: Path) -> None:
    """A run of two steps."""
    write_text(folder.parent / "text.jsonl")
    data = BASE["data"] | {"train": str(folder.parent / "text.jsonl"), "cache": str(folder.parent / "cache")}
    settings = BASE | {"name": folder.name, "data": data, "train": BASE["train"] | {"steps": 2}}
    train(from_dict(TrainConfig, settings), root=folder.parent, overwrite=True)


def make_checkpoint(folder: Path) -> None:
    """A checkpoint alone."""
    make_run(folder / "run")
    shutil.move(checkpoint.paths(folder / "run" / "checkpoints")[-1], folder / "checkpoint")
    for name in ("run", "cache"):
        shutil.rmtree(folder / name)
    (folder / "text.jsonl").unlink()


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Every tensor's bytes."""
    return {
        name: value.reshape(-1).view(torch.uint8).numpy().tobytes() + str(tuple(value.shape)).encode()
        for name, value in model.state_dict().items()
    }


def use_checkpoint(folder: Path) -> Any:
    """Its record and model."""
    return checkpoint.read(folder / "checkpoint").record, bits(load(folder / "checkpoint"))


def make_export(max_shard_bytes: float) -> Callable[[Path], None]:
    """A model as an export, of one shard or several."""

    def make(folder: Path) -> None:
        make_checkpoint(folder)
        save_model(load(folder / "checkpoint"), folder / "export", max_shard_bytes)
        shutil.rmtree(folder / "checkpoint")

    return make


def use_export(folder: Path) -> Any:
    """Its config and tensors."""
    model = load_model(folder / "export")
    return to_dict(model.config), bits(model)


def described(folder: Path) -> Any:
    """What an export's config.json says, with the tensors."""
    values = json.loads((folder / "export" / "config.json").read_text())
    model = load_model(folder / "export")
    own = to_dict(model.config)
    later = {"block": "pre_norm", "attention_span": 2048, "dropout": 0.0}
    told = {key: values.get(key, later.get(key)) for key in own}
    return {key: float(value) if isinstance(own[key], float) else value for key, value in told.items()}, bits(model)


def use_run(folder: Path) -> Any:
    """Its config and its numbers, as `remoe runs` shows them and as a resumed run cuts them."""
    run = Run.open(folder)
    shown = f"{run.valid_loss:.4f} {run.step:,} {run.tokens:,}"
    metrics = run.metrics()
    cut_back(folder / "metrics.jsonl", 1)
    return to_dict(run.config), json.dumps(metrics), shown, json.dumps(run.metrics())


def plain_run(folder: Path) -> Any:
    """The same by YAML and JSON alone."""
    config = to_dict(from_dict(TrainConfig, yaml.safe_load((folder / "config.yaml").read_bytes().decode())))
    content = (folder / "metrics.jsonl").read_bytes().decode(errors="replace")
    metrics = [json.loads(line) for line in content.split("\n")[:-1]]
    shown = (
        f"{last(metrics, 'valid_loss', float('nan')):.4f} {last(metrics, 'step', 0):,} {last(metrics, 'tokens', 0):,}"
    )
    return config, json.dumps(metrics), shown, json.dumps([line for line in metrics if line["step"] <= 1])


def last(metrics: list[dict[str, Any]], key: str, otherwise: Any) -> Any:
    """The newest value of a key."""
    return next((line[key] for line in reversed(metrics) if line.get(key) is not None), otherwise)


def same(content: bytes) -> bytes:
    """The content."""
    return content


TARGETS: dict[str, Target] = {
    "text": text_target(".txt", same, same),
    "text.gz": text_target(".txt.gz", gzip.compress, gzip.decompress),
    "jsonl": text_target(".jsonl", same, same),
    "jsonl.gz": text_target(".jsonl.gz", gzip.compress, gzip.decompress),
    "jsonl.xz": text_target(".jsonl.xz", lzma.compress, lzma.decompress),
    "jsonl.zst": text_target(".jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress, unzstd),
    "parquet": Target(make_parquet, lambda folder: our_documents(folder / "corpus.parquet"),
                      lambda folder: documents_of_parquet(folder / "corpus.parquet")),
    "dataset": Target(make_dataset, use_dataset, None),
    "saved characters": Target(make_tokenizer("characters"), lambda f: use_tokenizer(load_saved_tokenizer(f)), None),
    "saved words": Target(make_tokenizer("words"), lambda f: use_tokenizer(load_saved_tokenizer(f)), None),
    "saved tokenizer.json": Target(make_tokenizer("json"), lambda f: use_tokenizer(load_saved_tokenizer(f)), None),
    "tokenizer.json": Target(lambda folder: write_bpe(folder / "tokenizer.json") and None,
                             lambda f: use_tokenizer(load_tokenizer(str(f / "tokenizer.json"))), library_tokens),
    "checkpoint": Target(make_checkpoint, use_checkpoint, None),
    "export": Target(make_export(5e9), use_export, None, "**/*.safetensors"),
    "sharded export": Target(make_export(4000), use_export, None, "**/model*"),
    "export config": Target(make_export(5e9), use_export, described, "**/config.json"),
    "config.yaml": Target(make_run, use_run, plain_run, "config.yaml"),
    "metrics.jsonl": Target(make_run, use_run, plain_run, "metrics.jsonl"),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
