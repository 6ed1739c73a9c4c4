"""The gate: it counts written tokens without reading the canvas, and closes if the guider does not pay off."""

import pytest
import torch

from hf_flashdlm import ARGuider
from hf_flashdlm.guider_gate import Gate


MASK = 511
PROMPTS = [[5, 70, 200, 41, 333, 62, 90, 8], [77, MASK, 402, 256], [300, 21, MASK]]
POLICIES = [
    dict(window_policy="none"),
    dict(window_policy="none", grow_canvas=True),
    dict(window_policy="prefix"),
    dict(window_policy="dual"),
    dict(window_policy="dkv"),
    dict(),
    dict(right_window=5),
    dict(right_window=3, attend_stale=True),
    dict(grow_canvas=True),
    dict(synchronize_blocks=True),
]


def ask(gate, frontier, candidate):
    """One step of a gate with one row, whose candidates begin at the frontier."""
    positions = frontier + torch.arange(len(candidate))[None]
    candidate = torch.tensor([candidate], dtype=torch.bool)
    return bool(gate.ask(torch.tensor([0]), positions, torch.tensor([frontier]), candidate))


@pytest.mark.parametrize(
    ("with_guider", "without", "ratio", "stays"),
    [
        (2, 1, 0.9, True),
        (2, 1, 1.0, False),  # cost and gain are equal
        (3, 2, 0.4, True),
        (3, 2, 0.6, False),
        (1, 1, 0.0, False),
    ],
)
def test_it_stays_open_where_tokens_per_step_repay_the_cost(with_guider, without, ratio, stays):
    gate, frontier, asked = Gate(1, 64, ratio), 8, []
    for step in range(10):
        asked.append(ask(gate, frontier, [1] * 12))
        frontier += with_guider if step < Gate.TRIAL else without
    assert asked == [True] * 4 + [False] * 4 + [stays] * 2
    assert gate.closed_at.tolist() == [-1 if stays else 8]


def test_a_token_written_out_of_order_counts_as_well():
    gate = Gate(1, 12, 0.0)
    ask(gate, 2, [1, 1, 1, 1])
    ask(gate, 2, [1, 0, 1, 0])  # 3 and 5 were written
    assert gate.written[0].tolist() == [2, 0]
    ask(gate, 6, [1, 1, 0, 1])  # and 2 and 4; positions that come into view were not
    assert gate.written[0].tolist() == [4, 0]


class Counting(ARGuider):
    """A guider that compares the counts of the gate with the masks of the canvas."""

    def _process(self, input_ids, *arguments):
        result = super()._process(input_ids, *arguments)
        masks = (input_ids == MASK).sum(1)
        for row, left in zip(self.rows.tolist(), masks.tolist(), strict=True):
            step = int(self.gates.steps[row]) - 1
            if step == 0:
                self.begun[row] = left
            elif step <= 2 * Gate.TRIAL:
                assert int(self.gates.written[row].sum()) == self.begun[row] - left
                self.compared += 1
        return result


@pytest.mark.parametrize("beyond_prefix", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_it_counts_the_masks_that_have_gone(tiny, decode, policy, beyond_prefix):
    guider = Counting(tiny("guider"), gate="auto", num_drafts=6, beyond_prefix=beyond_prefix, accept="topk", top_k=60)
    guider.begun, guider.compared = {}, 0
    options = dict(max_new_tokens=28, block_length=4, pad_token_id=0, stop_at_eos=False, confidence_threshold=0.2)
    decode(tiny("dream_trained"), PROMPTS, guider=guider, **options, **policy)
    assert guider.compared > 8
