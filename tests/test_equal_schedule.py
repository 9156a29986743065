"""The helpers of `benchmarks/equal_schedule.py`: what is counted, what is refused, and what is compared with what."""

import functools

import pytest
import torch

from benchmarks.equal_contestants import ANCHORS, CONTESTANTS, MASK, OURS_CUT, PLAIN, SHELL, Compilation, Size, held_bytes, linear_weights
from benchmarks.equal_schedule import GOAL_SIZE, goals, row, table
from benchmarks.equal_worker import ATTENTIONS, STEP, Worker, blocks_run, peak, refusal

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
TINY = Size.parse("16x64x4")


def test_a_size_says_the_shape_of_the_input():
    size = Size.parse("1024x256x12")
    assert (size.latents, size.hidden_bytes, str(size)) == ((1, 4, 4, 32, 32), 1024 * 256 * 4, "1024x256x12")
    assert Size.parse("32x64x12").latents == (1, 4, 2, 8, 8)


@pytest.mark.parametrize("text", ["1024x256", "10x64x12", "32x65x12", "32x64x3"])
def test_a_size_that_no_model_has_is_refused(text):
    with pytest.raises(ValueError, match=r"must be|TOKENSxWIDTHxBLOCKS"):
        Size.parse(text)


def test_weights_use_every_anchor_that_there_is():
    for step, weights in enumerate(linear_weights()):
        assert (weights is not None) == bool(MASK[step])
        if weights is not None:
            assert sum(weights) == pytest.approx(1)
            assert sum(weight != 0 for weight in weights) == min(ANCHORS, MASK[:step].count(0))


def test_held_bytes_count_a_storage_once_and_no_module():
    tensor = torch.zeros(8)
    assert held_bytes({"a": [tensor, tensor[:4]], "model": torch.nn.Linear(2, 2)}, (torch.zeros(2),)) == 40


def test_blocks_are_counted_by_their_attention_kernels():
    one_block = [ATTENTION] * ATTENTIONS * 2
    assert blocks_run([ATTENTION, STEP, *one_block * 4, "aten::mm", STEP, STEP, *one_block], 2) == [4, 0, 1]


@pytest.mark.parametrize(
    ("ran", "why"),
    [
        ([4, 4, 0], ""),
        ([4, 4, 1], ""),  # the first block, which FirstBlockCache computes at each step
        ([4, 4, 2], "step 2 ran 2 of 4 blocks, but the mask says reuse"),
        ([4, 1, 0], "step 1 ran 1 of 4 blocks, but the mask says compute"),
        ([4, 4], "2 steps were seen, the mask has 3"),
    ],
)
def test_another_schedule_than_the_mask_is_refused(ran, why):
    assert refusal(ran, 4, (0, 0, 1)) == why


def test_peak_is_the_highest_sum():
    assert peak([5, 5, -8, 4, -6]) == 10


def test_a_run_as_fast_as_plain_and_shell_is_the_ideal():
    of_plain, of_shell = [8.0] * len(MASK), [2.0] * len(MASK)
    ideal = row([2.0 if reuses else 8.0 for reuses in MASK], of_plain, of_shell)
    assert ideal["run_over_ideal"] == ideal["computed_step_over_plain"] == ideal["reused_step_over_prologue_and_epilogue"] == 1
    slower = row([3.0 if reuses else 8.0 for reuses in MASK], of_plain, of_shell)
    assert slower["reused_step_over_prologue_and_epilogue"] == 1.5
    assert slower["speed_up_over_plain"] == pytest.approx(8 * len(MASK) / (8 * MASK.count(0) + 3 * MASK.count(1)))


@functools.cache
def warmed(name):
    return Worker(name, TINY, Compilation("eager")).warm_up()


@pytest.mark.parametrize(
    ("name", "blocks", "anchors"),
    [(SHELL, 0, 0), ("FirstBlockCache", 1, 0), ("MagCache", 0, 0), ("TaylorSeer", 0, 0), (OURS_CUT, 0, ANCHORS)],
)
def test_every_tool_follows_the_mask(name, blocks, anchors):
    facts = warmed(name)
    assert facts["blocks_run_at_reused_steps"] == blocks
    assert facts["graphs"] == facts["graph_breaks"] == facts["recompiles"] == 0
    if anchors:  # of the output's size, and the time and the index of each
        output = 4 * torch.Size(TINY.latents).numel()
        assert facts["state_bytes"] == len(TINY.contexts) * anchors * (output + 8)


def test_a_tool_that_computes_every_step_is_refused(monkeypatch):
    monkeypatch.setitem(CONTESTANTS, "MagCache", CONTESTANTS[PLAIN])
    with pytest.raises(RuntimeError, match="step 2 ran 4 of 4 blocks, but the mask says reuse"):
        Worker("MagCache", TINY, Compilation("eager")).warm_up()


def test_the_table_names_who_was_refused_and_who_is_left_out():
    numbers = row([1.0] * len(MASK), [2.0] * len(MASK), [1.0] * len(MASK))
    facts = {"peak_bytes": 2**20, "graphs": 1, "graph_breaks": 0, "recompiles": 0, "compile_seconds": 0.0, "state_over_hidden_state": 0.06}
    part = {"size": GOAL_SIZE, "mode": "eager", "plain_step_ms": 1.0, "prologue_and_epilogue_ms": 1.0, "refused": {"MagCache": "why"}}
    part["rows"] = {PLAIN: {**numbers, **facts}, OURS_CUT: {**numbers, **facts}}
    text = table([part], {"cache-dit": "not installed"})
    assert "| MagCache | refused: why |" in text
    assert "cache-dit is left out: not installed." in text
    assert [found["ratio"] for found in goals([part])] == [1.0, 0.06]
