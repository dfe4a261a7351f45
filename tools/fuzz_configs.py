#!/usr/bin/env python3
"""Generate configs: each must train a step, be built without values where it is large, or end in one message.

    python tools/fuzz_configs.py --count 10000 --seed 0 --output results/fuzz_configs.json

Values come from the config classes themselves: for every key those of its type (the ones that it allows by itself more
often), the words of its help, and some of other types; routers with options of their own signatures; now and then a key
or a section that does not exist. A config
is written as YAML, read, and given to `remoe.train` for one step, behind the command line's own handling of errors. The
exit code is 1 if one ends in anything but a step, or exit code 2 with one message.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import types
import typing
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import hypothesis.strategies as st
import torch
import yaml
from hypothesis.strategies import SearchStrategy

from remoe.cli.failures import exit_code_of
from remoe.config import from_dict
from remoe.errors import ConfigError
from remoe.model import ReMoEForCausalLM
from remoe.model.size import Workload, parameter_count, plan
from remoe.moe.routers import ROUTERS, router_class
from remoe.recipes import read_config
from remoe.training import TrainConfig, train
from remoe.training.metrics import read_metrics
from remoe.training.run import METRICS

STEPPED, BUILT, REFUSED = "trained a step", "built without values (large)", "refused with one message, exit code 2"
BASE: dict[str, Any] = {
    "name": "fuzz",
    "model": {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8,
              "num_experts": 4, "init_std": 0.1},
    "data": {"train": "text.jsonl", "sequence_length": 8, "cache": "cache"},
    "train": {"steps": 1, "batch_size": 4, "validation_batches": 1, "device": "cpu"},
}  # fmt: skip
INTEGERS = [0, 1, 2, 3, 4, 5, 8, 12, 16, 32, 64, -1, -7, 255, 1000, 2**31, 2**63, 10**30]
FLOATS = [0.0, -0.0, 1.0, 0.5, 0.1, 1e-8, 1.5, 2.0, 10.0, -1.0, 1e-300, 1e38, 1e300, math.inf, -math.inf, math.nan]
MAX_PARAMETERS, MAX_TOKENS, MAX_LAYERS = 500_000, 4096, 64
"""What a step is tried with; above that the model is built without values."""
WORD = r"[A-Za-z0-9_:./]+"
MAX_SECONDS = 120
"""A config that takes longer hangs."""


def main() -> int:
    """Run the campaign; 0 if every config ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="configs to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON with the counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        results = campaign(arguments.count, arguments.seed, Path(folder))
    print(json.dumps(results, indent=1, ensure_ascii=False))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(bool(results["faults"]))


def campaign(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Try `count` configs in a folder; how many ended how, and the smallest config of every kind of fault."""
    write_text(folder / "text.jsonl")
    outcomes: Counter[str] = Counter()
    faults: dict[str, str] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(configs())
    def run(values: dict[str, Any]) -> None:
        text = yaml.safe_dump(values, sort_keys=False)
        with limited(MAX_SECONDS):
            outcome, fault = outcome_of(text, folder)
        outcomes[outcome] += 1
        if fault is not None and len(text) < len(faults.get(fault, text + " ")):
            faults[fault] = text

    run()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "hypothesis": hypothesis.__version__}
    about = {"date": datetime.now(UTC).date().isoformat(), "seed": seed, "versions": versions}
    return about | {"configs": outcomes.total(), "outcomes": dict(outcomes.most_common()), "faults": faults}


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError inside after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(text: str, folder: Path) -> tuple[str, str | None]:
    """How a config ends, and what is wrong with that (None: nothing)."""
    try:
        code, said, found = run_config(text, folder)
    except Exception as error:  # noqa: BLE001  any of them is a fault of the program
        at = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__} in {Path(at.filename).name}: {str(error)[:200]}"
    finally:
        shutil.rmtree(folder / "runs", ignore_errors=True)
    if code == 0:
        return found[0]
    is_one_message = code == 2 and said.startswith("remoe: ") and "\n" not in said
    return (REFUSED, None) if is_one_message else ("fault", f"exit code {code}: {said[:200]}")


def run_config(text: str, folder: Path) -> tuple[int, str, list[tuple[str, str | None]]]:
    """Exit code and standard error of a config's step, and what the step found."""
    path, errors, found = folder / "config.yaml", io.StringIO(), []
    path.write_text(text, encoding="utf-8")
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = exit_code_of(lambda: found.append(take_step(path, folder)))
    return code, errors.getvalue().strip(), found


def take_step(path: Path, folder: Path) -> tuple[str, str | None]:
    """Train for one step, or build the model without values where it is large."""
    config = read_config(str(path))
    loop, model = config.train, config.model
    tokens = max(loop.batch_size, loop.micro_batch) * config.data.sequence_length
    sized = dataclasses.replace(model, vocab_size=model.vocab_size or 257)
    is_large = model.num_layers > MAX_LAYERS or parameter_count(sized).total > MAX_PARAMETERS or tokens > MAX_TOKENS
    if is_large:
        plan(sized, Workload(sequence_length=config.data.sequence_length, micro_batch_size=loop.micro_batch))
        with torch.device("meta"):
            ReMoEForCausalLM(dataclasses.replace(sized, num_layers=min(model.num_layers, MAX_LAYERS), moe_layers="all"))
        return BUILT, None
    run = train(dataclasses.replace(config, train=one_step(config)), root=folder / "runs")
    (line,) = read_metrics(run.path / METRICS)
    is_finite = line["loss"] is not None or line["skipped"] == 1
    return STEPPED, None if is_finite else f"a loss that is not finite was not skipped: {line}"


def one_step(config: TrainConfig) -> Any:
    """The loop's settings without what costs minutes or leaves this process; they were checked before."""
    return dataclasses.replace(
        config.train, steps=1, log_interval=1, validation_batches=1, max_bad_steps=2, compile=False, sinks=[]
    )


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config: the tiny base with up to six keys changed, and rarely something that has no place in it."""
    values = json.loads(json.dumps(BASE))
    keys, by_key = keys_of(TrainConfig), values_by_key()
    size = draw(st.integers(0, 4) | st.integers(0, 8))
    for key in draw(st.lists(st.sampled_from(sorted(keys)), min_size=size, max_size=size, unique=True)):
        set_key(values, key, draw(by_key[key]))
    if draw(st.integers(0, 19)) == 0:
        place = draw(st.sampled_from([values, *(value for value in values.values() if isinstance(value, dict))]))
        place[draw(st.sampled_from(sorted(values)) | st.text(max_size=8) | st.integers(-1, 3))] = draw(junk())
    return values


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested mappings."""
    section, _, name = key.rpartition(".")
    (values.setdefault(section, {}) if section else values)[name] = value


@functools.cache
def values_by_key() -> dict[str, SearchStrategy[Any]]:
    """For every key the values that it may get."""
    return {key: with_allowed(key, kind, help) for key, (kind, help) in keys_of(TrainConfig).items()}


def with_allowed(key: str, kind: Any, help: str) -> SearchStrategy[Any]:
    """Mostly values that the tiny config takes in this place; else any."""
    by_kind = {int: range(1, 9), float: (1e-8, 0.1, 0.5, 1.0, 2.0), bool: (True, False), str: re.findall(WORD, help)}
    kinds = typing.get_args(kind) or (kind,)
    allowed = [value for part in kinds for value in by_kind.get(part, ()) if is_allowed(key, value)]
    any_value = values_of(kind, help)
    return st.one_of([st.sampled_from(allowed)] * 3 + [any_value]) if allowed else any_value


def is_allowed(key: str, value: Any) -> bool:
    """Whether the tiny config may have this value."""
    values = json.loads(json.dumps(BASE))
    set_key(values, key, value)
    try:
        from_dict(TrainConfig, values)
    except ConfigError:
        return False
    return True


def keys_of(cls: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Type and help of every setting by dotted key, sections opened."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kind, key = hints[field.name], f"{prefix}{field.name}"
        is_section = dataclasses.is_dataclass(kind)
        found |= keys_of(kind, f"{key}.") if is_section else {key: (kind, field.metadata.get("help", ""))}
    return found


def values_of(kind: Any, help: str) -> SearchStrategy[Any]:
    """Values of a type, as YAML holds them; one in twenty is anything."""
    if "router name" in help:
        return routers() | of_type(kind, help)
    return st.integers(0, 19).flatmap(lambda number: junk() if number == 0 else of_type(kind, help))


def of_type(kind: Any, help: str) -> SearchStrategy[Any]:
    """Values that a type allows: plain, at the edges, and far too large; words from the key's help."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([of_type(part, help) for part in typing.get_args(kind)])
    if origin is list:
        return st.lists(of_type(typing.get_args(kind)[0], help), max_size=3)
    if origin is dict:
        return st.dictionaries(texts(help) | st.sampled_from(["name", "path", "weight"]), junk(), max_size=3)
    plain: dict[Any, SearchStrategy[Any]] = {
        int: st.integers(1, 16) | st.integers(1, 16) | st.sampled_from(INTEGERS),
        float: st.floats(0, 1) | st.floats(0, 1) | st.sampled_from(FLOATS),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain.get(kind, texts(help))


def texts(help: str) -> SearchStrategy[str]:
    """The words of a help text, words that mean something elsewhere, and any text."""
    words = sorted(set(re.findall(WORD, help)))
    others = ["", "auto", "none", "text.jsonl", "absent.txt", ".", "/", "x" * 300, "a/b", "../up", "1e3", "cuda:7"]
    return st.sampled_from(words or [""]) | st.sampled_from(others) | st.text(max_size=12)


def routers() -> SearchStrategy[Any]:
    """A registered router, alone or with some of the options that its class takes."""

    def with_options(name: str) -> SearchStrategy[Any]:
        kinds = typing.get_type_hints(router_class(name).__init__)
        own = [p.name for p in inspect.signature(router_class(name)).parameters.values() if p.kind is p.KEYWORD_ONLY]
        many = getattr(router_class(name), "options", None)
        kinds |= typing.get_type_hints(many) if many else {}
        helps = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(many)} if many else {}
        options = {key: values_of(kinds.get(key, str), helps.get(key, "")) for key in sorted({*own, *helps})}
        return st.fixed_dictionaries({"name": st.just(name)}, optional=options)

    names = st.sampled_from(sorted(ROUTERS))
    return names | names.flatmap(with_options)


@functools.cache
def junk() -> SearchStrategy[Any]:
    """Anything that YAML can say, lists and mappings to a depth of three."""
    leaves = st.none() | st.booleans() | st.sampled_from(INTEGERS) | st.sampled_from(FLOATS) | st.text(max_size=8)
    leaves |= st.dates() | st.binary(max_size=4)
    values = leaves
    for _ in range(3):
        values = leaves | st.lists(values, max_size=3) | st.dictionaries(leaves, values, max_size=2)
    return values


def write_text(path: Path) -> None:
    """Forty short documents of two domains."""
    draw = random.Random(0)
    rows = [
        {"text": " ".join(draw.choices(("one", "two", "three", "four"), k=20)), "meta": {"pile_set_name": domain}}
        for _ in range(20)
        for domain in ("a", "b")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
