"""The gate: it counts what the steps write, and closes where the guider does not pay."""

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


def ask(gate, *num_masked, able=None):
    """One step of a gate, for rows with this many masks left."""
    rows = torch.arange(len(num_masked))
    masked = torch.arange(64) >= 64 - torch.tensor(num_masked)[:, None]
    able = torch.ones(len(rows), dtype=torch.bool) if able is None else torch.tensor(able)
    return gate.ask(rows, able, masked).tolist()


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
    gate, left, asked = Gate(1, ratio), 40, []
    for step in range(10):
        asked += ask(gate, left)
        left -= with_guider if step < Gate.TRIAL else without
    assert asked == [True] * 4 + [False] * 4 + [stays] * 2
    assert gate.closed_at.tolist() == [-1 if stays else 8]


def test_a_row_that_waits_takes_no_step():
    gate, asked = Gate(2, 0.0), []
    for step in range(16):
        able = [True, step % 2 == 0]
        asked.append(ask(gate, 40 - step, 40 - step, able=able))
    first, second = zip(*asked, strict=True)
    assert first == (True,) * 4 + (False,) * 12
    assert second[::2] == (True,) * 4 + (False,) * 4 and not any(second[1::2])
    assert gate.closed_at.tolist() == [8, -1], "the second row has taken eight steps, and not begun another"


class Counting(ARGuider):
    """Compares the verdict of the gate with what the steps of the trial have written."""

    def __call__(self, input_ids, scores, **places):
        result = super().__call__(input_ids, scores, **places)
        masks = (input_ids == MASK).sum(1).tolist()
        for row, left in zip(self.rows.tolist(), masks, strict=True):
            self.left.setdefault(row, []).append(left)
            if len(self.left[row]) == 2 * Gate.TRIAL + 1:
                before, between, after = self.left[row][:: Gate.TRIAL]
                closes = before - between <= (between - after) * (1 + self.cost_ratio)
                assert (int(self.gates.closed_at[row]) >= 0) == closes
                self.closed.append(closes)
        return result


@pytest.mark.parametrize("beyond_prefix", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_it_counts_the_masks_that_have_gone(tiny, decode, policy, beyond_prefix):
    # One row at a time: in a batch some of these policies let rows wait, which take no step meanwhile.
    options = dict(max_new_tokens=60, block_length=4, pad_token_id=0, stop_at_eos=False, confidence_threshold=0.2)
    closed = []
    for prompt in PROMPTS:
        settings = dict(num_drafts=6, beyond_prefix=beyond_prefix, accept="topk", top_k=60, cost_ratio=0.3)
        guider = Counting(tiny("guider"), gate="auto", **settings)
        guider.left, guider.closed = {}, closed
        decode(tiny("dream_trained"), [prompt], guider=guider, **options, **policy)
    assert closed
