"""Fine-tuning on instructions: from a run's weights, on answers only, through the same trainer."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from remoe.data import Batch, open_corpus
from remoe.data.chat import load_template
from remoe.data.sampler import NO_LABEL, NO_TOKEN, Sampler
from remoe.errors import CheckpointError, ConfigError
from remoe.export import write_export
from remoe.model.weights import save_model
from remoe.training import Run, train
from remoe.training.frozen import is_frozen
from remoe.training.init_from import initial_model, with_origin
from remoe.training.loading import find_checkpoint, load
from remoe.training.saved import chat_template_of, tokenizer_of
from remoe.training.step import Stepper


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Answers of different lengths."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": " ".join([str(n)] * (1 + n % 4))} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pretrained(config, tmp_path):
    """A short run of the router that a test asks for."""

    def make(router="relu", **sparsity):
        model = config().model
        values = {"model": dataclasses.asdict(dataclasses.replace(model, router=router))}
        return train(config(name=f"base-{router}", sparsity=sparsity or {"init": 1e-3}, **values), root=tmp_path)

    return make


@pytest.fixture
def tuned(config, questions, tmp_path):
    """The config that fine-tunes a run: no model section, plain data settings."""

    def make(origin, name="tuned", **train_keys):
        data = {"train": str(questions), "format": "instructions", "template": "plain", "sequence_length": 32,
                "cache": tmp_path / "cache", "tokenizer": "bytes"}  # fmt: skip
        small = config(name=name)
        loop = dataclasses.replace(small.train, init_from=None if origin is None else origin.path, **train_keys)
        return dataclasses.replace(
            small,
            model=type(small.model)(),
            data=dataclasses.replace(small.data, **data),
            train=loop,
            optimizer=dataclasses.replace(small.optimizer, weight_decay=0.0, schedule="constant"),
        )

    return make


def test_a_run_starts_from_the_weights_model_tokenizer_and_coefficient_of_another(pretrained, tuned, tmp_path):
    base = pretrained(init=1e-3)
    run = train(tuned(base, steps=1), root=tmp_path)
    assert run.config.model == base.config.model
    assert tokenizer_of(run.path).fingerprint == tokenizer_of(base.path).fingerprint
    started = initial_model(run.config).state_dict()
    assert all(value.equal(started[name]) for name, value in load(base.path).state_dict().items())
    expected = torch.zeros((), dtype=torch.float64)
    find_checkpoint(base.path).load({"sparsity.log_coef": expected})
    assert run.metrics()[0]["sparsity_coef"] == pytest.approx(math.exp(expected), rel=1e-6)


def test_an_export_can_be_started_from_too(pretrained, tuned, tmp_path):
    base = pretrained()
    save_model(load(base.path).bfloat16(), tmp_path / "export")
    tokenizer_of(base.path).save(tmp_path / "export")
    config = tuned(base, steps=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=tmp_path / "export"))
    run = train(config, root=tmp_path)
    assert run.config.model == base.config.model
    assert next(load(run.path).parameters()).dtype == torch.float32
    assert run.metrics()[0]["sparsity_coef"] == pytest.approx(config.sparsity.init)


def test_the_loss_is_that_of_the_answers_and_padding_is_neither_seen_nor_routed(pretrained, tuned):
    base = pretrained("topk")
    config = with_origin(tuned(base), None)
    corpus = open_corpus(config.data)
    batch = Sampler(corpus.train, 32, config.train.batch_size, 0).batch(0)
    model = load(base.path)
    total, answers, tokens = 0.0, 0, 0
    with torch.no_grad():
        for row_S, labels_S, document_S in zip(batch.tokens_BS, batch.labels_BS, batch.document_BS, strict=True):
            length = int((document_S != NO_TOKEN).sum())
            log_probs_SV = model(row_S[None, :length]).logits[0].log_softmax(-1)
            for place in (labels_S != NO_LABEL).nonzero()[:, 0].tolist():
                total -= float(log_probs_SV[place, labels_S[place]])
                answers += 1
            tokens += length
    values = Stepper(config, initial_model(config), torch.device("cpu")).run(batch, 1)
    assert float(values["lm_loss"]) == pytest.approx(total / answers, rel=1e-5)
    assert values["tokens"].tolist() == [tokens] * 2
    assert values["active"].tolist() == [tokens * config.model.top_k] * 2


def test_micro_batches_and_padding_do_not_change_the_loss(pretrained, tuned):
    config = with_origin(tuned(pretrained("topk")), None)
    batch = Sampler(open_corpus(config.data).train, 32, config.train.batch_size, 0).batch(0)
    wider = Batch(*(
        torch.nn.functional.pad(values, (0, 8), value=fill)
        for values, fill in zip(batch, (0, NO_LABEL, NO_TOKEN, 0), strict=True)
    ))  # fmt: skip
    halves = dataclasses.replace(config.train, micro_batch_size=config.train.batch_size // 2)
    losses = [
        float(Stepper(run, initial_model(run), torch.device("cpu")).run(rows, 1)["lm_loss"])
        for run, rows in ((config, batch), (config, wider), (dataclasses.replace(config, train=halves), batch))
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_resumed_run_goes_on_exactly_although_its_origin_is_gone(pretrained, tuned, numbers, tmp_path):
    base = pretrained()
    whole = train(tuned(base, name="whole", steps=6), root=tmp_path)
    train(tuned(base, name="cut", steps=3), root=tmp_path)
    shutil.move(base.path, tmp_path / "elsewhere")
    cut = train(tuned(base, name="cut", steps=6), root=tmp_path, resume=True)
    expected, lines = numbers(whole.metrics()), numbers(cut.metrics())
    kept = [{k: v for k, v in line.items() if not k.startswith("valid")} for line in lines]
    assert kept == [{k: v for k, v in line.items() if not k.startswith("valid")} for line in expected]


def test_the_answers_are_learned(pretrained, tuned, tmp_path):
    run = train(tuned(pretrained(), steps=60), root=tmp_path)
    losses = [line["lm_loss"] for line in run.metrics()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert run.valid_loss < losses[0]


@pytest.mark.parametrize(
    ("router", "mode", "frozen"),
    [
        ("relu", "head", {"weight"}),
        ("rmoe", "head", {"head"}),
        ("rmoe", "head_and_cell", {"head", "weight_ih", "weight_hh", "bias_ih", "bias_hh"}),
        ("rmoe", "all", {"head", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "projector"}),
    ],
)
def test_frozen_router_weights_stay_and_all_else_moves(pretrained, tuned, tmp_path, router, mode, frozen):
    base = pretrained(router)
    run = train(tuned(base, name=f"tuned-{mode}", steps=3, freeze_router=mode), root=tmp_path)
    before, after = dict(load(base.path).named_parameters()), dict(load(run.path).named_parameters())
    stayed = {name for name, value in before.items() if value.equal(after[name])}
    assert {name for name in before if is_frozen(name, mode)} == stayed
    assert {name.rpartition(".")[2] for name in stayed} == frozen


def test_frozen_routers_resume_exactly(pretrained, tuned, numbers, tmp_path):
    base = pretrained("rmoe")
    keys = {"freeze_router": "head_and_cell", "validation_interval": 3}
    whole = train(tuned(base, name="whole", steps=6, **keys), root=tmp_path)
    train(tuned(base, name="cut", steps=3, **keys), root=tmp_path)
    cut = train(tuned(base, name="cut", steps=6, **keys), root=tmp_path, resume=True)
    assert [line["lm_loss"] for line in numbers(cut.metrics())] == [
        line["lm_loss"] for line in numbers(whole.metrics())
    ]
    with pytest.raises(ConfigError, match=r"train\.freeze_router is 'none', but"):
        train(tuned(base, name="cut", steps=8), root=tmp_path, resume=True)


def test_what_does_not_fit_the_origin_is_refused_before_anything_is_written(pretrained, tuned, tmp_path):
    base = pretrained()
    config = tuned(base, name="refused")
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=64))
    with pytest.raises(ConfigError, match=r"model\.hidden_size is 64, but train\.init_from .* has 16"):
        train(wide, root=tmp_path)
    other = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokenizer="characters", format="text", text_field="output")
    )
    with pytest.raises(ConfigError, match=r"data\.tokenizer is characters, but train\.init_from .* with bytes"):
        train(other, root=tmp_path)
    gone = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="is not a run, a checkpoint or an export"):
        train(gone, root=tmp_path)
    same = dataclasses.replace(base.config.model, vocab_size=None)
    assert with_origin(dataclasses.replace(config, model=same), None).model == base.config.model
    dense = dataclasses.replace(
        config, train=dataclasses.replace(config.train, freeze_router="head", init_from=None),
        model=dataclasses.replace(base.config.model, moe_layers="none"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"train\.freeze_router is 'head', but the model has no router"):
        train(dense, root=tmp_path)
    assert not (tmp_path / "refused").exists()


def test_the_template_stays_with_the_run_and_its_export(pretrained, tuned, tmp_path):
    run = train(tuned(pretrained(), steps=1), root=tmp_path)
    (found,) = run.checkpoints.iterdir()
    write_export(load(run.path), tokenizer_of(run.path), tmp_path / "export", run)
    for place in (run.path, found, tmp_path / "export"):
        assert chat_template_of(place).source == load_template("plain").source
    with pytest.raises(CheckpointError, match="has no chat template, must be fine-tuned"):
        chat_template_of(tmp_path / "base-relu")


def test_a_run_written_before_these_settings_still_opens(pretrained):
    base = pretrained()
    text = (base.path / "config.yaml").read_text()
    kept = [line for line in text.splitlines() if not line.strip().startswith(("init_from", "freeze_router", "format"))]
    (base.path / "config.yaml").write_text("\n".join(kept) + "\n")
    assert Run.open(base.path).config == base.config
