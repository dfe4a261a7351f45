"""A mistake in the config: one message with what, allowed and fix; exit code 2; nothing written."""

import pytest

MISTAKES = {
    "unknown section": ("modl.num_layers=2", "unknown key 'modl'; did you mean 'model'?"),
    "unknown key": ("model.hiden_size=2", "unknown key 'model.hiden_size'; did you mean 'hidden_size'?"),
    "wrong type": ("train.steps=many", "train.steps is 'many'"),
    "fraction for a count": ("model.num_layers=2.5", "model.num_layers is 2.5"),
    "text for a number": ("optimizer.lr=fast", "optimizer.lr is 'fast'"),
    "list for a section": ("model=[1]", "model is [1]"),
    "no value": ("train.steps", "has no value, must be dotted.key=value"),
    "key below a value": ("seed.x=1", "'seed' is a value, not a section"),
    "unreadable value": ("name=[", "cannot be read"),
    "top_k above num_experts": ("model.top_k=9", "top_k is 9, must be between 1 and num_experts = 4"),
    "no expert at all": ("model.num_experts=0", "num_experts is 0, must be at least 1"),
    "granularity": ("model.granularity=3", "granularity is 3, must divide intermediate_size"),
    "heads": ("model.num_heads=3", "model.num_heads is 3, must divide model.hidden_size"),
    "key/value heads": ("model.num_kv_heads=3", "model.num_kv_heads is 3, must divide model.num_heads"),
    "odd head": ("model.head_size=5", "model.head_size is 5, must be even"),
    "router": ("model.router=rleu", "did you mean 'relu'?"),
    "router without a name": ("model.router={eps: 1}", "must be a name or {name: NAME, option: value, ...}"),
    "router option": ("model.router={name: relu, epz: 1}", "router 'relu' has no option 'epz'; did you mean 'eps'?"),
    "type of a router option": ("model.router={name: relu, eps: x}", "router option eps is 'x'"),
    "layer": ("model.moe_layers=[9]", "model.moe_layers names layer 9, must be between 0 and"),
    "layers": ("model.moe_layers=some", "model.moe_layers is 'some', must be all, none, or a list"),
    "schedule": ("optimizer.schedule=cosin", "did you mean 'cosine'?"),
    "lr order": ("optimizer.min_lr=1", "optimizer.min_lr is 1.0, must be between 0.0 and"),
    "decay rate": ("optimizer.beta2=1", "optimizer.beta2 is 1.0, must be at least 0 and below 1"),
    "epsilon": ("optimizer.eps=0", "optimizer.eps is 0.0, must be above 0"),
    "seed": ("seed=99999999999999999999", "seed is 99999999999999999999, must be between 0 and"),
    "multiplier": ("sparsity.multiplier=1", "sparsity.multiplier is 1.0, must be above 1"),
    "coefficient": ("sparsity.init=0", "sparsity.init is 0.0, must be between"),
    "micro-batch": ("train.micro_batch_size=3", "train.micro_batch_size is 3, must divide train.batch_size"),
    "precision": ("train.precision=fp8", "train.precision is 'fp8', must be one of fp32, bf16"),
    "no step": ("train.steps=0", "train.steps is 0, must be at least 1"),
    "device": ("train.device=gpu", "train.device is 'gpu', must be auto, cpu, cuda or cuda:N"),
    "sink": ("train.sinks=[tensorbord]", "did you mean 'tensorboard'?"),
    "name": ("name=../x", "name is '../x', must be letters"),
    "vocabulary": ("model.vocab_size=7", "model.vocab_size is 7, must be at least 257"),
    "no text": ("data.train=absent.txt", "data.train: absent.txt does not exist"),
    "empty blend": ("data.train=[]", "data.train is an empty list"),
}


@pytest.mark.parametrize(("override", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_a_setting_is_one_line_and_writes_nothing(remoe, tmp_path, tiny, override, message):
    outcome = remoe("train", "demo-relu", *tiny, "--set", override)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: {num_layers: 2", "is not valid YAML"),
        (b"- 1\n- 2\n", "holds a list, must be a mapping"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"modle: {}\n", "unknown key 'modle'; did you mean 'model'?"),
        (b"data: {trian: x}\n", "unknown key 'data.trian'; did you mean 'train'?"),
        (b"train: {steps: yes please}\n", "train.steps is 'yes please'"),
    ],
)
def test_mistake_in_a_file_is_one_line(remoe, tmp_path, text, message):
    (tmp_path / "own.yaml").write_bytes(text)
    outcome = remoe("train", "own.yaml")
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "CONFIG is missing"),
        ("train absent.yaml", "config absent.yaml does not exist; `remoe recipes` lists the ready ones"),
        ("train .", "config . is a folder"),
        ("train demo-rleu", "neither a YAML file nor a recipe; did you mean 'demo-relu'?"),
        ("train remoe-182m-relu", "data.train: pile_train does not exist"),
        ("plan demo-rleu", "did you mean 'demo-relu'?"),
        ("compare demo-relu --routers relu,topq --name x", "--routers names 'topq'"),
        ("compare demo-relu --routers relu --seeds 1.5 --name x", "--seeds is '1.5', must be whole numbers"),
        ("analyze absent", "absent is not a run"),
        ("generate absent", "absent is not a run"),
        ("export absent --to x", "absent is not a run"),
        ("eval absent", "absent is not a run"),
        ("runs diff absent other", "absent is not a run"),
    ],
)
def test_what_is_not_there_is_one_line(remoe, tmp_path, arguments, message):
    outcome = remoe(*arguments.split())
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_existing_run_needs_a_word_and_stays_as_it_is(remoe, tiny, run_folder):
    before = {file: file.read_bytes() for file in run_folder.rglob("*") if file.is_file()}
    command = ("train", "demo-relu", *tiny, "--set", "name=seen", "--root", run_folder.parent)
    outcome = remoe(*command)
    assert outcome.code == 2
    assert "--resume goes on with it, --overwrite begins it anew" in outcome.err
    assert "exclude each other" in remoe(*command, "--resume", "--overwrite").err
    changed = remoe(*command, "--resume", "--set", "model.num_experts=2")
    assert changed.code == 2
    assert "model.num_experts is 2, but" in changed.err
    assert {file: file.read_bytes() for file in run_folder.rglob("*") if file.is_file()} == before
