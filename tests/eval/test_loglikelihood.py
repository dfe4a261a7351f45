"""Log-likelihoods of continuations are those of a plain forward pass over each whole sequence."""

import dataclasses

import pytest
import torch

from remoe.errors import ConfigError
from remoe.eval.loglikelihood import Request, ScoringConfig, loglikelihoods, shares_contexts
from remoe.eval.shared_context import lay_out, plant
from remoe.model import ReMoEConfig, ReMoEForCausalLM

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
         "intermediate_size": 48, "num_experts": 4, "init_std": 0.2}  # fmt: skip
CONFIG = ScoringConfig(max_length=24)


def model_with(**keys):
    return ReMoEForCausalLM(ReMoEConfig(**(SMALL | keys))).eval()


def ids(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def some_requests():
    """Contexts of several lengths, shared and alone; continuations of one token and more."""
    contexts = [ids(length, seed=length) for length in (1, 5, 9, 17)]
    return [
        Request(context, ids(1 + (place + turn) % 4, seed=100 + 10 * place + turn))
        for turn in range(3)
        for place, context in enumerate(contexts)
    ]


@torch.no_grad()
def by_one_plain_pass_each(model, requests, max_length):
    answers = []
    for context, continuation in requests:
        tokens = torch.tensor([*context, *continuation][-(max_length + 1) :])
        log_probs = model(tokens[None, :-1]).logits[0].float().log_softmax(-1)[-len(continuation) :]
        labels = torch.tensor(continuation)
        answers.append(
            (float(log_probs.gather(1, labels[:, None]).sum()), bool((log_probs.argmax(-1) == labels).all()))
        )
    return answers


def assert_same(answers, expected):
    assert [answer.loglikelihood for answer in answers] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [answer.is_greedy for answer in answers] == [is_greedy for _, is_greedy in expected]


@pytest.mark.parametrize(
    "keys",
    [
        {"router": "relu"},
        {"router": "topk", "top_k": 2},
        {"router": "recurrent_relu"},
        {"router": "rmoe", "top_k": 2},
        {"router": "hash"},
        {"router": "lory"},
        {"moe_layers": "none"},
        {"block": "post_norm", "num_kv_heads": None, "attention_span": 16, "router": "topk"},
        {"tie_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_answers_are_those_of_a_plain_pass_over_each_sequence(keys, batch_size):
    model, requests = model_with(**keys), some_requests()
    answers = loglikelihoods(model, requests, dataclasses.replace(CONFIG, batch_size=batch_size))
    assert_same(answers, by_one_plain_pass_each(model, requests, 24))


def test_the_beginning_of_a_context_that_is_too_long_is_left_out():
    model, requests = model_with(), [Request(ids(40), ids(length)) for length in (1, 3, 24)]
    assert_same(loglikelihoods(model, requests, CONFIG), by_one_plain_pass_each(model, requests, 24))


def test_the_model_reads_a_shared_context_once():
    model, requests = model_with(), [Request(ids(9), ids(4, seed=seed)) for seed in range(3)]
    seen = []
    model.model.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    shared = loglikelihoods(model, requests, CONFIG)
    alone = loglikelihoods(model, requests, dataclasses.replace(CONFIG, share_contexts=False))
    assert seen == [(1, 9 + 3 * 3), (3, 9 + 3)]
    assert [a.loglikelihood for a in shared] == pytest.approx([a.loglikelihood for a in alone], abs=1e-5)


def test_one_token_continuations_of_a_context_cost_no_token():
    rows = lay_out(list(plant([((1, 2, 3), (4,)), ((1, 2, 3), (5,))], share=True)), torch.device("cpu"))
    assert rows.tokens_BS.tolist() == [[1, 2, 3]]
    assert rows.place_M.tolist() == [2, 2]
    assert rows.placement.attention_mask is None


def test_a_branch_sees_the_context_and_itself():
    rows = lay_out(list(plant([((1, 2), (3, 4)), ((1, 2), (5, 6, 7))], share=True)), torch.device("cpu"))
    assert rows.tokens_BS.tolist() == [[1, 2, 3, 5, 6]]
    assert rows.placement.position_BS.tolist() == [[0, 1, 2, 2, 3]]
    assert rows.placement.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert rows.place_M.tolist() == [1, 2, 1, 3, 4]
    assert rows.label_M.tolist() == [3, 4, 5, 6, 7]


def test_a_row_of_branches_ends_before_it_is_twice_a_long_context():
    requests = [(tuple(range(300)), tuple(range(101)))] * 7
    assert [len(tree.branches) for tree in plant(requests, share=True)] == [3, 3, 1]


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"router": "relu"}, True),
        ({"router": "rmoe"}, True),
        ({"router": "lory"}, False),
        ({"router": "expert_choice"}, False),
        ({"router": {"name": "rmoe", "passing": "shuffle"}}, False),
        ({"block": "post_norm", "num_kv_heads": None}, False),
    ],
    ids=str,
)
def test_contexts_are_shared_only_where_tokens_are_routed_by_themselves(keys, shares):
    assert shares_contexts(model_with(**keys)) == shares


def test_progress_is_told_in_requests():
    told = []
    loglikelihoods(model_with(), some_requests(), dataclasses.replace(CONFIG, batch_size=1), told.append)
    assert sum(told) == 12
    assert len(told) > 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "must have at least 1 of each"),
        (Request([1], []), "must have at least 1 of each"),
        (Request([1], [1] * 25), "max_length is 24, must be at least 25"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused(request_, message):
    with pytest.raises(ConfigError, match=message):
        loglikelihoods(model_with(), [request_], CONFIG)


def test_no_requests_have_no_answers():
    assert loglikelihoods(model_with(), [], CONFIG) == []
