"""A layer that starves, or whose experts idle, is spoken of once, and not before it has lasted."""

from remoe.training import train
from remoe.training.progress import LogReporter
from remoe.training.starvation import StarvationWatch


def heard(lines):
    said = []
    watch = StarvationWatch(said.append)
    for step, no_expert, idle in lines:
        watch.see({"step": step, "layers": {"no_expert": no_expert, "idle_experts": idle}})
    return said


def test_a_layer_that_starves_for_a_hundred_steps_is_named_once():
    said = heard([(step, [0.1, 0.8], [0, 0]) for step in range(50, 400)])
    assert said == [
        "more than 75% of the tokens in layer 1 have had no expert since step 50; "
        "sparsity.density_floor=0.5 with sparsity.revival_coef=0.01 brings them back"
    ]


def test_a_layer_that_recovers_in_time_is_not_named():
    assert not heard([(step, [0.9 if step % 100 else 0.2], [0]) for step in range(1, 1000)])


def test_experts_that_idle_for_a_thousand_steps_are_spoken_of():
    said = heard([(step, [0.0], [2]) for step in range(1, 1001, 10)] + [(1011, [0.0], [1])])
    assert len(said) == 1
    assert said[0].startswith("layer 0 has had experts that no token used since step 1; ")


def test_a_dense_model_has_nothing_to_say():
    watch = StarvationWatch(lambda text: None)
    watch.see({"step": 1, "layers": {}})
    assert not watch._since


def test_a_run_passes_it_on_to_its_reporter(config, tmp_path, monkeypatch):
    monkeypatch.setattr("remoe.training.starvation.PATIENCE", {"starving": 2, "idle": 2})
    monkeypatch.setattr("remoe.training.starvation.STARVING_SHARE", -1.0)
    messages = []
    reporter = LogReporter()
    monkeypatch.setattr(reporter, "message", messages.append)
    train(config(train={"steps": 4}), root=tmp_path, reporter=reporter)
    assert [text for text in messages if "in layer 0 have had no expert since step 1" in text]
    messages.clear()
    train(config("other", model={"router": "topk"}, train={"steps": 4}), root=tmp_path, reporter=reporter)
    assert not messages
