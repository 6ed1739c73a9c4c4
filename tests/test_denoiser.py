"""The border with the model: row j of the logits scores the j-th requested position, whatever is fed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashdlm import FreeCache
from hf_flashdlm.denoiser import ClassifierFreeGuidance, Denoiser
from hf_flashdlm.windows import Window


ATOL = 1e-4  # rounding of the models' logits; the scores of a neighbouring position differ by at least 1e-1
LENGTH = 10


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["llada", "dream"])
def model(request, tiny):
    return tiny(request.param)


def canvas_of(batch_size=2):
    return torch.randint(0, 500, (batch_size, LENGTH), generator=torch.Generator().manual_seed(0))


def all_seen(batch_size=2):
    return torch.ones(batch_size, LENGTH, dtype=torch.long)


def shift_of(model):
    return getattr(model.config, "logits_shift", 0)


def denoiser_of(model, mask=None, cached=True):
    mask = all_seen() if mask is None else mask
    return Denoiser(model, mask, FreeCache(LENGTH) if cached else None, shift_of(model))


def window_of(lo, hi, attended=None, frozen=None, batch_size=2, scored=None, **fields):
    """The windows of the rows, from numbers or from lists with a number per row."""
    values = (lo, hi, LENGTH if attended is None else attended, 0 if frozen is None else frozen)
    rows = zip(*(torch.as_tensor(value).expand(batch_size).tolist() for value in values), strict=True)
    scored = [None] * batch_size if scored is None else [bytearray(row) for row in scored.tolist()]
    return [Window(*row, places, **fields) for row, places in zip(rows, scored, strict=True)]


def consecutive(starts, count):
    return [range(start, start + count) for start in starts]


def alone(model, row):
    """Scores of every position of one row without padding, from one plain forward: `logits[p]` scores position p."""
    logits = model(row[None]).logits[0]
    shift = shift_of(model)
    return torch.cat([logits[:shift], logits[: len(row) - shift]])


def reference(model, canvas, positions, mask=None, attended=None):
    """Scores of all rows at their positions, each row computed alone."""
    rows = []
    for row, where in enumerate(torch.as_tensor(positions)):
        start = 0 if mask is None else int((mask[row] == 0).sum())
        stop = LENGTH if attended is None else attended[row]
        rows.append(alone(model, canvas[row, start:stop])[where - start])
    return torch.stack(rows)


def warmed(denoiser, canvas):
    """A denoiser after its first forward, which computes everything."""
    denoiser(
        canvas,
        window_of(0, LENGTH, batch_size=len(canvas)),
        consecutive([0] * len(canvas), 1),
        [0] * len(canvas),
    )
    return denoiser


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def test_the_models_differ_in_their_shift(tiny):
    assert (shift_of(tiny("llada")), shift_of(tiny("dream"))) == (0, 1)


@pytest.mark.parametrize("cached", [False, True])
def test_every_position_of_the_canvas_is_scored_by_its_own_logits(model, cached):
    canvas, positions = canvas_of(), consecutive([1, 1], LENGTH - 1)
    logits, computed = denoiser_of(model, cached=cached)(canvas, window_of(0, LENGTH), positions, [1, 1])
    assert_close(logits, reference(model, canvas, positions))
    assert computed == [LENGTH, LENGTH] and logits.dtype == torch.float32


@pytest.mark.parametrize("lo", range(1, LENGTH))
def test_a_cut_window_is_right_at_every_position_its_first_included(model, lo):
    """The planted off-by-one: the first score of a shifted model comes from the position before the window."""
    canvas, positions = canvas_of(), consecutive([lo, lo], LENGTH - lo)
    denoiser = warmed(denoiser_of(model), canvas)
    logits, computed = denoiser(canvas, window_of(lo, LENGTH, frozen=lo), positions, [lo, lo])
    assert_close(logits, reference(model, canvas, positions))
    assert computed == [LENGTH - lo + shift_of(model)] * 2


def test_a_window_that_holds_the_position_before_its_frontier_is_not_widened(model):
    canvas = canvas_of()
    _, computed = warmed(denoiser_of(model), canvas)(canvas, window_of(3, 9), consecutive([4, 4], 2), [4, 4])
    assert computed == [6, 6]


@settings(max_examples=25)
@given(st.sampled_from(["llada", "dream"]), st.data())
def test_uneven_windows_of_padded_rows_equal_each_row_alone(tiny, name, data):
    model, canvas, draw = tiny(name), canvas_of(3), data.draw
    padding = [draw(st.integers(0, 3)) for _ in range(3)]
    mask = (torch.arange(LENGTH) >= torch.tensor(padding)[:, None]).long()
    denoiser = warmed(denoiser_of(model, mask), canvas)
    frozen = list(padding)
    for _ in range(3):
        frontier = [draw(st.integers(max(low + shift_of(model), 1), LENGTH - 1)) for low in frozen]
        frozen = [draw(st.integers(low, first - shift_of(model))) for low, first in zip(frozen, frontier, strict=True)]
        hi = [draw(st.integers(first + 1, LENGTH)) for first in frontier]
        count = max(end - first for end, first in zip(hi, frontier, strict=True))
        positions = consecutive([min(first, LENGTH - count) for first in frontier], count)
        logits, computed = denoiser(canvas, window_of(frozen, hi, frozen=frozen, batch_size=3), positions, frontier)
        positions = torch.tensor(positions)
        asked = (positions >= torch.tensor(frontier)[:, None]) & (positions < torch.tensor(hi)[:, None])
        expected = reference(model, canvas, positions.maximum(torch.tensor(padding)[:, None]), mask)
        assert_close(logits[asked], expected[asked])
        assert computed == [end - low for end, low in zip(hi, frozen, strict=True)]


@pytest.mark.parametrize("cached", [False, True])
def test_padding_on_the_left_changes_nothing(model, cached):
    canvas, positions = canvas_of(), consecutive([6, 6], 4)
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
    denoiser = denoiser_of(model, mask, cached)
    logits, _ = denoiser(canvas, window_of(0, LENGTH), positions, [6, 6])
    assert_close(logits, reference(model, canvas, positions, mask))
    canvas[0, :4] = 7  # what the padding holds must not matter
    logits, _ = denoiser(canvas, window_of(0, LENGTH), positions, [6, 6])
    assert_close(logits, reference(model, canvas, positions, mask))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("ends", [[8, 8], [7, 9]])
def test_rows_see_their_own_number_of_keys(model, cached, ends):
    canvas, positions = canvas_of(), consecutive([5, 5], 2)
    denoiser = denoiser_of(model, cached=cached)
    if cached:
        warmed(denoiser, canvas)
    logits, computed = denoiser(canvas, window_of(0, ends, ends), positions, [5, 5])
    assert_close(logits, reference(model, canvas, positions, attended=ends))
    assert computed == ends


@pytest.mark.parametrize("too", [False, True])
def test_scattered_positions_are_scored_by_their_own_logits(model, too):
    canvas, scored = canvas_of(), torch.zeros(2, LENGTH, dtype=torch.bool)
    scored[0, [4, 6, 7]] = True
    scored[1, [5, 9]] = True
    positions = consecutive([4, 4], 6)
    denoiser = warmed(denoiser_of(model), canvas)
    window = window_of(0, LENGTH, scored=scored, include_scored=too)
    logits, computed = denoiser(canvas, window, positions, [4, 5])
    asked = scored.gather(1, torch.tensor(positions))
    assert_close(logits[asked], reference(model, canvas, positions)[asked])
    if not (too and shift_of(model)):
        assert computed == [3, 2]
    else:
        assert computed == [5, 4], "3 to 7, and 4, 5, 8, 9"


def test_scattered_positions_stay_out_of_what_is_frozen(model):
    canvas, positions = canvas_of(), consecutive([4, 4], 6)
    denoiser = warmed(denoiser_of(model), canvas)
    scored = torch.arange(LENGTH).expand(2, -1) >= 4
    window = window_of(3, LENGTH, frozen=3, scored=scored)
    logits, _ = denoiser(canvas, window, positions, [4, 4])
    assert_close(logits, reference(model, canvas, positions))
    assert denoiser.cache.frozen_length.tolist() == [3, 3]


def test_a_window_that_freezes_less_than_before_refreshes(model):
    canvas, positions = canvas_of(), consecutive([6, 6], 4)
    denoiser = warmed(denoiser_of(model), canvas)
    denoiser(canvas, window_of(5, LENGTH, frozen=5), positions, [6, 6])
    changed = canvas.clone()
    changed[:, 2] += 1
    stale, _ = denoiser(changed, window_of(5, LENGTH, frozen=5), positions, [6, 6])
    fresh, _ = denoiser(changed, window_of(0, LENGTH), positions, [6, 6])
    assert_close(stale, reference(model, canvas, positions))
    assert_close(fresh, reference(model, changed, positions))
    assert (stale - fresh).abs().max() > 10 * ATOL, "the change must show in the scores"


def test_rows_that_leave_take_their_padding_and_their_states_with_them(model):
    canvas, positions = canvas_of(3), consecutive([6, 6], 4)
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [0] * 2 + [1] * 8])
    denoiser = warmed(denoiser_of(model, mask), canvas)
    kept = torch.tensor([2, 0])
    denoiser.batch_select_indices(kept)
    logits, _ = denoiser(canvas[kept], window_of(5, LENGTH, frozen=5), positions, [6, 6])
    assert_close(logits, reference(model, canvas[kept], positions, mask[kept]))


@pytest.fixture
def forwards(model):
    """The keywords of each forward of the model."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    yield seen
    hook.remove()


def test_only_the_rows_of_the_head_that_are_asked_for_are_computed(model, forwards):
    denoiser_of(model)(canvas_of(), window_of(0, LENGTH), consecutive([4, 4], 3), [4, 4])
    assert forwards[0]["logits_to_keep"].tolist() == [position - shift_of(model) for position in (4, 5, 6)]


def test_positions_are_counted_from_the_first_token_after_the_padding(model, forwards):
    """Check positions themselves: rotary positions are relative, so the logits of these models would not differ."""
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
    denoiser = warmed(denoiser_of(model, mask), canvas_of())
    denoiser(canvas_of(), window_of(6, [8, 9]), consecutive([7, 7], 2), [7, 7])
    assert forwards[0]["position_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 2, 3, 4, 5], list(range(10))]
    assert forwards[1]["position_ids"].tolist() == [[2, 3, 3], [6, 7, 8]], "the shorter row repeats its last position"


@pytest.mark.parametrize("cached", [False, True])
def test_no_mask_of_queries_times_keys_is_built_where_the_kernel_can_do_without(model, monkeypatch, cached):
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for padding in (0, 3):
        mask = all_seen()
        mask[0, :padding] = 0
        denoiser = denoiser_of(model, mask, cached)
        denoiser(canvas_of(), window_of(0, LENGTH), consecutive([4, 4], 3), [4, 4])
        assert masks and all(mask is None if not padding else mask.shape == (2, 1, 1, LENGTH) for mask in masks)
        masks.clear()


def test_other_backends_get_the_mask_in_the_form_of_transformers(model, forwards):
    mask = all_seen()
    mask[0, :3] = 0
    denoiser = denoiser_of(model, mask)
    denoiser.backend = "eager"
    denoiser(canvas_of(), window_of(0, LENGTH), consecutive([4, 4], 3), [4, 4])
    assert torch.equal(forwards[0]["attention_mask"], mask)


# Classifier-free guidance


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_guidance_is_that_of_two_forwards(model, cached, padded):
    canvas, positions = canvas_of(), consecutive([6, 7], 3)
    frontier, given = [6, 7], torch.arange(LENGTH).expand(2, -1) < 6
    mask, scale = all_seen(), 2.5
    if padded:
        mask[0, :2] = 0
    blank = torch.where(given, 511, canvas)
    plain = [denoiser_of(model, mask, cached) for _ in range(2)]
    guided = ClassifierFreeGuidance(
        denoiser_of(model, mask.repeat(2, 1), cached), scale, torch.full_like(canvas, 511), given
    )
    for window in (window_of(0, LENGTH), window_of(5, LENGTH, frozen=5)):
        (with_prompt, computed), (without, _) = (
            denoiser(tokens, window, positions, frontier)
            for denoiser, tokens in zip(plain, (canvas, blank), strict=True)
        )
        logits, both = guided(canvas, window, positions, frontier)
        assert_close(logits, without + scale * (with_prompt - without))
        assert both == [2 * count for count in computed]
        assert (logits - with_prompt).abs().max() > 10 * ATOL, "guidance must change something"


def test_guidance_of_scale_one_is_none(model):
    canvas, positions, frontier = canvas_of(), consecutive([6, 6], 3), [6, 6]
    given = torch.arange(LENGTH).expand(2, -1) < 6
    guided = ClassifierFreeGuidance(denoiser_of(model, all_seen(4)), 1.0, torch.full_like(canvas, 511), given)
    logits, _ = guided(canvas, window_of(0, LENGTH), positions, frontier)
    assert_close(logits, reference(model, canvas, positions))


def test_a_guided_row_that_leaves_takes_both_its_halves_along(model):
    canvas, frontier = canvas_of(), [6]
    given = torch.arange(LENGTH).expand(2, -1) < torch.tensor([[4], [6]])
    unconditional = torch.full_like(canvas, 511)
    guided = ClassifierFreeGuidance(denoiser_of(model, all_seen(4)), 2.0, unconditional, given)
    guided(canvas, window_of(0, LENGTH), consecutive([6, 6], 3), [6, 6])
    guided.batch_select_indices(torch.tensor([1]))
    logits, _ = guided(canvas[1:], window_of(5, LENGTH, frozen=5, batch_size=1), consecutive([6], 3), frontier)
    only = ClassifierFreeGuidance(denoiser_of(model, all_seen(2)), 2.0, unconditional[1:], given[1:])
    expected, _ = only(canvas[1:], window_of(0, LENGTH, batch_size=1), consecutive([6], 3), frontier)
    assert_close(logits, expected)
