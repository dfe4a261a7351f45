"""The worked vectors of RMoE §9.1-9.4 and §9.8, in float64 and float32."""

import pytest
import torch
from torch import nn

from remoe import RouterContext
from remoe.moe import losses, stats
from remoe.moe.cells import affine
from remoe.moe.recurrence import normalized
from tests.moe.routers.rmoe_vectors import mat, vec
from tests.moe.worked_rmoe import F64, INPUTS, assert_near, fill, run, worked_routers

BOTH = pytest.mark.parametrize("dtype", [F64, torch.float32])

H = [
    [0.20178390960865955, -0.13264725809922104],
    [0.36720334318982273, -0.09224005013255182],
    [0.394161867515754, -0.026931964365268447],
]
LOGITS = [
    [0.23429400966104186, 0.06646078709644918, -0.4718125159224278, -0.6298342356393931],
    [0.6188867866447492, 0.26163992480117226, -0.6882866613133696, 0.3814051401161136],
    [0.8258026153372877, 0.6432170050273401, -0.49124280127363107, 0.5421876637620449],
]
GATES = [
    [0.5418600921828892, 0.4581399078171107, 0, 0],
    [0.5590929476293488, 0, 0, 0.44090705237065114],
    [0.545520012482284, 0.45447998751771596, 0, 0],
]
PROBABILITIES = [
    [0.36225639970678747, 0.30628591395103083, 0.1787960412811637, 0.15266164506101806],
    [0.3624771048850573, 0.2535888999060984, 0.09808043088760382, 0.2858535643212404],
    [0.3503736860131013, 0.29190098401924663, 0.09387413002239947, 0.2638511999452525],
]


@BOTH
def test_gru_routing_over_three_layers(dtype):
    for layer, routing in enumerate(run(worked_routers(dtype=dtype))):
        assert_near(routing.state_TP, H[layer], dtype)
        assert_near(routing.logits_TE, LOGITS[layer], dtype)
        assert_near(routing.logits_TE.softmax(-1), PROBABILITIES[layer], dtype)
        assert_near(routing.weights_TE, GATES[layer], dtype)
        assert routing.routing_map_TE.tolist() == [[gate > 0 for gate in GATES[layer]]]


GRU_GATES = [  # reset, update and new of layers 1 and 2
    [[0.45115626505294837, 0.35342909090255187], [0.49850000449998383, 0.39795338513330664],
     [0.4023607406167027, -0.2203272218856211]],
    [[0.35264137186214906, 0.411651777004231], [0.39734614938553964, 0.4585385433399212],
     [0.47626889533056777, -0.05802106362193576]],
]  # fmt: skip


@BOTH
def test_gates_inside_the_gru(dtype):
    routers = worked_routers(dtype=dtype)
    state_TP = torch.zeros(1, 2, dtype=dtype)
    inputs = [[-0.42, 0.32], [-0.88, 0.72], [-0.78, 0.8]]
    for layer, (router, routing) in enumerate(zip(routers, run(routers), strict=True)):
        u_TP = affine(INPUTS[layer].to(dtype), router.projector, router.projector_bias)
        assert_near(u_TP, inputs[layer], dtype)
        of_input, of_state = router.cell.from_input(u_TP).chunk(3, -1), router.cell.from_state(state_TP).chunk(3, -1)
        reset, update = (torch.sigmoid(of_input[i] + of_state[i]) for i in (0, 1))
        new = torch.tanh(of_input[2] + reset * of_state[2])
        if layer < 2:
            for value, expected in zip((reset, update, new), GRU_GATES[layer], strict=True):
                assert_near(value, expected, dtype)
        assert_near((1 - update) * new + update * state_TP, H[layer], dtype)
        state_TP = routing.state_TP


@BOTH
def test_entropy_and_balance_of_the_gates(dtype):
    first, second, _ = run(worked_routers(dtype=dtype))
    for routing, entropy, inner, outer in (
        (first, 1.324976274322939, 1.182739339964244, 0.6685423136578184),
        (second, 1.3014809144512631, 1.268051723426152, 0.6483306692062978),
    ):
        tolerance = 1e-9 if dtype == F64 else 1e-5
        assert stats.gate_entropy(routing).tolist() == pytest.approx([entropy], abs=tolerance)
        assert stats.inner_balance(routing).tolist() == pytest.approx([inner], abs=tolerance)
        assert stats.outer_balance(routing).tolist() == pytest.approx([outer], abs=tolerance)


@BOTH
def test_a_given_first_state_is_used(dtype):
    routings = run(worked_routers(dtype=dtype), state_TP=torch.tensor([[0.25, -0.5]], dtype=dtype))
    assert_near(routings[0].state_TP, [0.3075687822118945, -0.2913431783608186], dtype)
    assert_near(routings[1].state_TP, [0.403426388948492, -0.14650870098848287], dtype)
    assert_near(routings[2].state_TP, [0.40587617082927185, -0.04609826733219445], dtype)


@pytest.mark.parametrize(
    ("passing", "expected"),
    [
        ("full", [0.005288216694217174, 0.04830303274054023, 0.0014411941369771477]),
        ("detach", [0.0, 0.0, 0.0]),
        ("none", [0.0, 0.0, 0.0]),
        ("gradient_only", [0.012901133800495904, 0.0441373262308814, -0.002892997962790784]),
    ],
)
@BOTH
def test_gradient_of_the_last_logit_by_the_first_input(passing, expected, dtype):
    first = INPUTS[0].to(dtype).requires_grad_()
    routings = run(worked_routers(dtype=dtype, passing=passing), [first, *INPUTS[1:]])
    (gradient,) = torch.autograd.grad(routings[2].logits_TE[0, 0], first, materialize_grads=True, allow_unused=True)
    assert_near(gradient, expected, dtype)


@pytest.mark.parametrize("passing", ["none", "gradient_only"])
def test_without_the_state_s_value_the_hidden_matrix_is_dead_and_its_bias_is_not(passing):
    routers = worked_routers(passing=passing)
    routings = run(routers)
    assert_near(routings[2].state_TP, [0.2586831858393045, -0.03155911381114007])
    sum(routing.logits_TE.square().sum() for routing in routings).backward()
    cell = routers[0].cell
    assert cell.weight_hh.grad.eq(0).all()
    assert all((part != 0).any() for part in cell.bias_hh.grad.chunk(3))


@BOTH
def test_no_passing(dtype):
    routings = run(worked_routers(dtype=dtype, passing="none"))
    assert_near(routings[1].state_TP, [0.29136784331983706, -0.06633805026107566], dtype)
    assert_near(routings[2].state_TP, [0.2586831858393045, -0.03155911381114007], dtype)
    assert_near(
        routings[1].logits_TE, [0.4154117871618254, 0.3004929246083865, -0.5495666615091362, 0.20289689063244476], dtype
    )
    assert_near(
        routings[2].logits_TE, [0.49404663531497134, 0.566223365297372, -0.2880247787589567, 0.28048459930088915], dtype
    )


@pytest.mark.parametrize(
    ("mode", "expected", "order"),
    [
        ("one_step", [0.701752528895884, 0.7164698276015653, -0.5628081095135249, 0.38193304461711153], [1, 0]),
        ("accumulated", [0.7603260313111445, 0.7330850243756776, -0.6807612384941317, 0.22447448570726325], [0, 1]),
    ],
)
@pytest.mark.parametrize("detach_residual", [False, True])
@BOTH
def test_logit_residual_without_passing(mode, expected, order, detach_residual, dtype):
    options = {"residual_coef": 0.5, "residual_mode": mode, "detach_residual": detach_residual}
    last = run(worked_routers(dtype=dtype, passing="none", **options))[2]
    assert_near(last.logits_TE, expected, dtype)
    assert last.logits_TE[0].topk(2).indices.tolist() == order
    assert last.state_TP.shape == (1, 2 + 4)


@BOTH
def test_scores_handed_on_would_be_another_rule(dtype):
    # the paper's formula adds scores, its text logits; ours adds logits. The scores' sum as the spec works it out:
    _, second, third = run(worked_routers(dtype=dtype, passing="none"))
    scores = third.logits_TE.softmax(-1) + 0.5 * second.logits_TE.softmax(-1)
    assert_near(scores, [0.4616868921407299, 0.46647759809075906, 0.19879272990138758, 0.37304277986712353], dtype)


@BOTH
def test_rnn_cell(dtype):
    routings = run(worked_routers(dtype=dtype, cell="rnn"))
    assert_near(routings[0].state_TP, [0.5689710350887308, -0.2203272218856211], dtype)
    assert_near(routings[1].state_TP, [0.5784785793952617, 0.23037332938372257], dtype)
    assert_near(routings[2].state_TP, [0.5630867724690581, 0.16266925838567498], dtype)
    assert_near(
        routings[2].logits_TE, [0.963713043594133, 1.106881903005879, -0.7446301587035872, 0.5008350281667664], dtype
    )


@BOTH
def test_lstm_cell(dtype):
    routings = run(worked_routers(dtype=dtype, cell="lstm"))
    assert_near(routings[0].state_TP[:, :2], [0.06707249751786355, -0.10503394244302919], dtype)
    assert_near(routings[1].state_TP[:, :2], [0.11086271266302265, -0.17116605187516454], dtype)
    assert_near(routings[2].state_TP[:, :2], [0.15239829642714323, -0.21112565051348992], dtype)
    assert_near(routings[2].state_TP[:, 2:], [0.36577563373333444, -0.46181530509131075], dtype)
    assert_near(
        routings[2].logits_TE,
        [0.4976842168380929, 0.15394784718659177, -0.12859744464071485, 0.42704789388126635],
        dtype,
    )


@BOTH
def test_gru_that_reads_the_hidden_state_itself(dtype):
    routings = run(worked_routers(dtype=dtype, projector="shared"))
    assert_near(routings[0].state_TP, [-0.0925296256206038, -0.13578881863181613], dtype)
    assert_near(routings[1].state_TP, [0.30432978619853324, -0.473125061575014], dtype)
    assert_near(routings[2].state_TP, [0.44171622174014313, -0.5296957506636792], dtype)
    assert_near(
        routings[2].logits_TE, [1.6988341803458769, -0.3385333904572869, -0.5625743326102147, 1.6428239448076447], dtype
    )


@pytest.mark.parametrize("learned_leak", ["no", "scalar", "vector"])
@BOTH
def test_leaky_sum(dtype, learned_leak):
    routings = run(worked_routers(dtype=dtype, cell="leaky", learned_leak=learned_leak))
    for routing, h in zip(routings, ([-0.42, 0.32], [-1.09, 0.88], [-1.325, 1.24]), strict=True):
        assert_near(routing.state_TP, h, dtype)


UNIT_STATES = [
    [1.1817412842474695, -0.7768446029323633],
    [1.3716017929868272, -0.3445410301768445],
    [1.410923876469855, -0.09640443354575338],
]


@BOTH
def test_recurrent_relu_gates_and_penalties(dtype):
    routers = worked_routers("recurrent_relu", dtype=dtype, norm_eps=0.0, bias=True)
    for layer, router in enumerate(routers, start=1):
        fill(router, head=mat(40 + layer, 4, 2), head_bias=torch.zeros(4))
    routings = run(routers)
    for routing, unit in zip(routings, UNIT_STATES, strict=True):
        assert_near(normalized(routing.state_TP, 0.0), unit, dtype)
    assert_near(routings[0].weights_TE, [0.7429446867404225, 0, 0, 0], dtype)
    assert_near(routings[1].weights_TE, [0.6864571292654686, 0, 0, 0.5837510529844704], dtype)
    assert_near(routings[2].weights_TE, [0.7343832682986535, 0.10253061422868416, 0, 0.6029313240062434], dtype)
    assert sum(routing.routing_map_TE.sum().item() for routing in routings) == 6  # S = 0.5, the target of k = 2
    plain = torch.stack([losses.sparsity_l1(routing, 2, load_balanced=False) for routing in routings])
    assert_near(plain.mean(), 1.1509993585079807, dtype)
    balanced = torch.stack([losses.sparsity_l1(routing, 2) for routing in routings])
    assert_near(balanced, [1.485889373480845, 2.540416364499878, 2.879690413067162], dtype)


@BOTH
def test_xmoe_head_on_the_state(dtype):
    cosine = worked_routers(dtype=dtype, head="cosine", head_size=2, bias=False)[0]
    cosine.projector_bias = nn.Parameter(vec(11, 2).to(dtype))
    fill(cosine, head_proj=mat(97, 2, 2), head=mat(99, 4, 2), log_temperature=torch.zeros(1))
    expected = [-0.7840411278028078, 0.09123917725135665, -0.9848121722831924, 0.9685951088688728]
    assert_near(cosine(INPUTS[0].to(dtype)).logits_TE, expected, dtype)


def test_layers_hand_on_nothing_through_modules():
    routers = worked_routers()
    before = {name: value.clone() for router in routers for name, value in router.state_dict().items()}
    first, second = run(routers), run(routers)
    assert all(torch.equal(a.logits_TE, b.logits_TE) for a, b in zip(first, second, strict=True))
    assert before.keys() == {name for router in routers for name in router.state_dict()}
    alone = routers[1](INPUTS[1], RouterContext(state_TP=first[0].state_TP))
    assert torch.equal(alone.logits_TE, first[1].logits_TE)
