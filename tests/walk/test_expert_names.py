"""Which rows of a stack are whose, and what its linear layers are called."""

import numpy as np
import pytest

from bitladder.walk.correspondence import correspond
from bitladder.walk.expert_names import linear_experts, names_on_disk

EXPERTS, WIDE, INPUTS = 3, 4, 5
_RNG = np.random.default_rng(0)
GATE, UP = (_RNG.normal(size=(EXPERTS, WIDE, INPUTS)).astype(np.float32) for _ in range(2))
PATH = "mlp.experts.gate_up_proj"
FILE = {"ffn_gate_exps.weight": GATE, "ffn_up_exps.weight": UP}
SIZES = (EXPERTS, 2 * WIDE, INPUTS)


def found(stack: np.ndarray, file: dict[str, np.ndarray] = FILE):
    roles, layout = correspond({PATH: np.ascontiguousarray(stack)}, file)[PATH]
    return linear_experts(PATH, EXPERTS, roles, layout)


def named(*words: str) -> tuple[str, ...]:
    return tuple(f"mlp.experts.{{}}.{word}_proj" for word in words)


@pytest.mark.parametrize("turned", [False, True])
def test_runs_and_turns_of_rows(turned):
    def made(stack):
        return stack.swapaxes(1, 2) if turned else stack

    in_runs, in_turn = np.concatenate([GATE, UP], 1), np.stack([GATE, UP], 2).reshape(SIZES)
    assert found(made(in_runs)) == (named("gate", "up"), False)
    assert found(made(in_turn)) == (named("gate", "up"), True)
    assert found(made(np.concatenate([UP, GATE], 1))) == (named("up", "gate"), False)
    assert found(made(np.stack([UP, GATE], 2).reshape(SIZES))) == (named("up", "gate"), True)


def test_one_tensor_of_both_has_the_gate_above():
    both = np.concatenate([GATE, UP], 1)
    assert found(both, {"ffn_gate_up_exps.weight": both}) == (named("gate", "up"), False)
    assert found(both.swapaxes(1, 2), {"ffn_gate_up_exps.weight": both}) == (named("gate", "up"), False)


def test_rows_in_any_other_order_have_no_names():
    in_runs = np.concatenate([GATE, UP], 1)
    assert found(in_runs[:, [0, 2, 1, 3, 4, 5, 6, 7]]) is None
    assert found(in_runs[:, [0, 1, 4, 5, 2, 3, 6, 7]]) is None
    assert found(np.concatenate([GATE, UP[:, ::-1]], 1)) is None
    assert found(in_runs[::-1]) is None
    assert linear_experts("conv.weight", EXPERTS, ("shortconv.conv.weight",), "same") is None


def test_names_of_checkpoints_that_hold_experts_one_by_one():
    stored = {f"block_sparse_moe.experts.{one}.w1.weight": GATE[one] for one in range(EXPERTS)}
    stored |= {f"block_sparse_moe.experts.{one}.w3.weight": UP[one] for one in range(EXPERTS)}
    stack = np.concatenate([GATE, UP], 1)
    wanted = ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3")
    assert names_on_disk(PATH, stack, stored) == wanted
    del stored["block_sparse_moe.experts.2.w3.weight"]
    assert names_on_disk(PATH, stack, stored) == ()
