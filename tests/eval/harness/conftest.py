"""Tiny files in the form of each task, a tiny run, and no network."""

import json
import socket
from pathlib import Path

import pytest

from remoe.config import from_dict
from remoe.training import TrainConfig, train

COLOURS = ("red", "green", "blue", "black", "white", "brown")


def arc(number: int, key: str = "question") -> dict:
    options = [COLOURS[(number + shift) % 6] for shift in range(4)]
    return {key: f"What colour is thing {number}?", "choices": {"text": options, "label": list("ABCD")},
            "answerKey": "ABCD"[number % 4]}  # fmt: skip


def race(number: int) -> dict:
    problems = [
        {"question": f"Which one is {place}?", "answer": "ABCD"[number % 4], "options": list(COLOURS[:4])}
        for place in range(2)
    ]
    return {"article": f"Thing {number} was seen. " * 3, "problems": repr(problems)}


ROWS = {
    "arc_easy_test": arc,
    "arc_easy_validation": lambda i: arc(1000 + i),
    "arc_challenge_test": arc,
    "boolq_validation": lambda i: {"question": f"is thing {i} red", "passage": f"Thing {i} is red.", "label": i % 2},
    "hellaswag_validation": lambda i: {
        "activity_label": "Painting", "ctx_a": f"Person {i} paints.", "ctx_b": "the wall", "label": str(i % 4),
        "endings": [f"turns {COLOURS[(i + k) % 6]} and dries." for k in range(4)],
    },
    "lambada_openai": lambda i: {"text": f"They painted thing {i} with a brush and it was {COLOURS[i % 6]}"},
    "openbookqa_test": lambda i: arc(i, "question_stem"),
    "piqa_validation": lambda i: {"goal": f"Paint {i}.", "sol1": "Use a brush.", "sol2": "Eat it.", "label": i % 2},
    "race_test": race,
    "more/sciq_validation": lambda i: {
        "support": "", "question": f"What is {i}?", "correct_answer": COLOURS[i % 6],
        **{f"distractor{k}": COLOURS[(i + k) % 6] for k in (1, 2, 3)},
    },
    "winogrande_validation": lambda i: {
        "sentence": f"Ann met Bea {i} times and _ smiled.", "option1": "Ann", "option2": "Bea", "answer": "12"[i % 2],
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with six rows of each task."""
    folder = tmp_path_factory.mktemp("evals")
    for name, row in ROWS.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(6)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A model of bytes that has learned a little."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text("Question: What colour is it?\nAnswer: red\n\n" * 100, encoding="utf-8")
    size = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
    values = {
        "name": "seen",
        "model": size | {"num_experts": 4, "init_std": 0.1},
        "data": {"train": str(text), "sequence_length": 192, "cache": str(folder / "cache")},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 4, "batch_size": 2, "validation_batches": 1, "device": "cpu"},
    }
    return train(from_dict(TrainConfig, values), root=folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever wants to leave this machine fails."""

    def refuse(*_):
        raise AssertionError("evaluation from local files used the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
