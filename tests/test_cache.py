"""FreeCache: exact as long as the canvas does not change, and never a write into frozen positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flashdlm import FreeCache
from hf_flashdlm.compiling import CACHE_NAME


ATOL = 1e-4  # rounding of the models' logits; a state of the wrong position is off by 1e-1 and more
LENGTH = 12


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["llada", "llada_gqa", "dream"])
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def canvas():
    return torch.randint(0, 500, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def logits_of(model, canvas, positions, cache=None):
    """Logits of a forward over the positions `(N,)` or `(B, N)` of the canvas."""
    positions = positions.expand(len(canvas), -1)
    return model(canvas.gather(1, positions), position_ids=positions, **{CACHE_NAME: cache}).logits


def states(start, stop, batch_size=1):
    """States of one head of size 1: each holds its own position, plus 100 times its row."""
    return (torch.arange(start, stop) + 100 * torch.arange(batch_size)[:, None])[:, None, :, None].float()


def filled(batch_size=1, length=6):
    cache = FreeCache()
    cache.update(states(0, length, batch_size), -states(0, length, batch_size), 0)
    return cache


def kept(cache, row=0):
    return cache.layers[0].keys[row, 0, :, 0].tolist()


# Exactness


@pytest.mark.parametrize(("lo", "hi"), [(0, 12), (0, 1), (3, 9), (5, 12), (11, 12)])
def test_a_window_of_an_unchanged_canvas_equals_the_full_forward(model, canvas, lo, hi):
    cache = FreeCache()
    full = logits_of(model, canvas, torch.arange(LENGTH), cache)
    cache.freeze(lo)
    cache.window(lo, hi)
    window = logits_of(model, canvas, torch.arange(lo, hi), cache)
    torch.testing.assert_close(window, full[:, lo:hi], atol=ATOL, rtol=0)


def test_window_after_window_stays_exact(model, canvas):
    cache = FreeCache()
    full = logits_of(model, canvas, torch.arange(LENGTH), cache)
    for lo, hi in [(0, 4), (2, 8), (6, 7), (3, 12)]:
        cache.window(lo, hi)
        window = logits_of(model, canvas, torch.arange(lo, hi), cache)
        torch.testing.assert_close(window, full[:, lo:hi], atol=ATOL, rtol=0)


@pytest.mark.parametrize("positions", [[[3, 4, 5], [7, 8, 9]], [[11, 2, 5], [0, 6, 1]], [[4, 5, 5], [1, 8, 9]]])
def test_positions_scattered_over_rows_equal_the_full_forward(model, canvas, positions):
    positions, cache = torch.tensor(positions), FreeCache()
    full = logits_of(model, canvas, torch.arange(LENGTH), cache)
    cache.freeze(positions.amin(1))
    cache.scatter(positions)
    expected = full.gather(1, positions[..., None].expand(-1, -1, full.shape[-1]))
    torch.testing.assert_close(logits_of(model, canvas, positions, cache), expected, atol=ATOL, rtol=0)
    cache.window(int(positions.max()), LENGTH)
    rest = logits_of(model, canvas, torch.arange(int(positions.max()), LENGTH), cache)
    torch.testing.assert_close(rest, full[:, int(positions.max()) :], atol=ATOL, rtol=0)


@pytest.mark.parametrize("attended", [8, 9])
def test_keys_after_the_attended_ones_are_as_if_they_were_not_there(model, canvas, attended):
    cache = FreeCache()
    logits_of(model, canvas, torch.arange(LENGTH), cache)
    short = logits_of(model, canvas[:, :attended], torch.arange(attended))
    cache.window(0, attended, attended)
    window = logits_of(model, canvas, torch.arange(attended), cache)
    torch.testing.assert_close(window, short, atol=ATOL, rtol=0)
    cache.window(5, 8, attended)
    window = logits_of(model, canvas, torch.arange(5, 8), cache)
    torch.testing.assert_close(window, short[:, 5:8], atol=ATOL, rtol=0)
    cache.scatter(torch.tensor([[6, 2], [7, 7]]), attended)
    window = logits_of(model, canvas, torch.tensor([[6, 2], [7, 7]]), cache)
    torch.testing.assert_close(
        window, short[torch.arange(2)[:, None], torch.tensor([[6, 2], [7, 7]])], atol=ATOL, rtol=0
    )


def test_buffers_longer_than_the_first_forward_grow_into_their_canvas(model, canvas):
    cache = FreeCache(canvas_length=LENGTH)
    cache.window(0, 8, attended=8)
    logits = logits_of(model, canvas, torch.arange(8), cache)
    torch.testing.assert_close(logits, logits_of(model, canvas[:, :8], torch.arange(8)), atol=ATOL, rtol=0)
    assert cache.canvas_length == LENGTH
    cache.window(0, LENGTH)
    logits = logits_of(model, canvas, torch.arange(LENGTH), cache)
    torch.testing.assert_close(logits, logits_of(model, canvas, torch.arange(LENGTH)), atol=ATOL, rtol=0)


def test_the_first_forward_into_longer_buffers_sees_no_empty_states(model, canvas):
    cache = FreeCache(canvas_length=LENGTH)
    logits = logits_of(model, canvas, torch.arange(8), cache)
    torch.testing.assert_close(logits, logits_of(model, canvas[:, :8], torch.arange(8)), atol=ATOL, rtol=0)


def test_a_changed_token_after_the_frozen_ones_leaves_their_bytes_alone(model, canvas):
    cache = FreeCache()
    logits_of(model, canvas, torch.arange(LENGTH), cache)
    before = [layer.keys[:, :, :5].clone() for layer in cache.layers]
    tail = cache.layers[0].keys[:, :, 5:].clone()
    cache.freeze(5)
    cache.window(5, LENGTH)
    logits_of(model, (canvas + 1) % 500, torch.arange(5, LENGTH), cache)
    assert all(torch.equal(layer.keys[:, :, :5], keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert not torch.equal(cache.layers[0].keys[:, :, 5:], tail)


def test_rows_dropped_from_the_batch_leave_the_others_exact(model, canvas):
    cache = FreeCache()
    full = logits_of(model, canvas, torch.arange(LENGTH), cache)
    cache.freeze(torch.tensor([2, 6]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.window(6, LENGTH)
    rest = logits_of(model, canvas[1:], torch.arange(6, LENGTH), cache)
    torch.testing.assert_close(rest, full[1:, 6:], atol=ATOL, rtol=0)


# Freezing


@pytest.mark.parametrize(
    "write", [lambda cache: cache.window(2, 6), lambda cache: cache.scatter(torch.tensor([[4, 2]]))]
)
def test_a_write_into_frozen_positions_is_refused(write):
    cache = filled()
    cache.freeze(3)
    with pytest.raises(ValueError, match=r"after the frozen length \[3\], got \[2\]: frozen positions are never"):
        write(cache)


def test_a_forward_that_forgot_to_move_its_window_cannot_rewrite_frozen_positions():
    cache = filled()
    cache.freeze(3)
    with pytest.raises(ValueError, match="frozen"):
        cache.update(states(50, 56), states(50, 56), 0)
    assert kept(cache) == [0, 1, 2, 3, 4, 5]


def test_each_row_is_frozen_up_to_its_own_length():
    cache = filled(batch_size=2)
    cache.freeze(torch.tensor([1, 4]))
    cache.scatter(torch.tensor([[1, 2], [4, 5]]))
    cache.update(states(51, 53, 2), states(51, 53, 2), 0)
    assert kept(cache) == [0, 51, 52, 3, 4, 5] and kept(cache, row=1) == [100, 101, 102, 103, 151, 152]
    for write in (lambda: cache.scatter(torch.tensor([[1, 2], [3, 5]])), lambda: cache.window(1, 6)):
        with pytest.raises(ValueError, match=r"frozen length \[1, 4\]"):
            write()


def test_freezing_twice_is_freezing_once():
    cache = filled()
    cache.freeze(3)
    cache.freeze(3)
    assert cache.frozen_length.tolist() == [3] and kept(cache) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("first", "second"), [(3, 2), (torch.tensor([1, 4]), torch.tensor([2, 3]))])
def test_what_is_frozen_does_not_shrink(first, second):
    cache = filled(batch_size=2)
    cache.freeze(first)
    with pytest.raises(
        ValueError, match="must not be below the frozen length .* frozen states stay frozen until `thaw`"
    ):
        cache.freeze(second)
    assert torch.equal(cache.frozen_length, torch.as_tensor(first).reshape(-1))


def test_a_thawed_cache_can_be_refreshed():
    cache = filled()
    cache.freeze(4)
    cache.thaw()
    cache.window(0, 6)
    cache.update(states(50, 56), states(50, 56), 0)
    assert kept(cache) == [50, 51, 52, 53, 54, 55]


@pytest.mark.parametrize(("cache", "computed"), [(FreeCache(), 0), (filled(), 6)])
def test_only_what_has_been_computed_can_be_frozen(cache, computed):
    with pytest.raises(
        ValueError, match=rf"at most the {computed} positions computed so far, got \[7\]: run the forward"
    ):
        cache.freeze(7)


def test_buffers_longer_than_the_first_forward_cannot_be_frozen_beyond_it():
    cache = FreeCache(canvas_length=6)
    cache.window(0, 4, attended=4)
    cache.update(states(0, 4), states(0, 4), 0)
    cache.freeze(4)
    with pytest.raises(ValueError, match="at most the 4 positions computed so far"):
        cache.freeze(5)


# Windows


@pytest.mark.parametrize(
    ("lo", "hi", "message"),
    [(3, 3, r"at least one position .* canvas of 6, got \[3\] to \[3\]"), (3, 7, r"canvas of 6, got \[3\] to \[7\]")],
)
def test_a_window_is_not_empty_and_lies_within_the_canvas(lo, hi, message):
    with pytest.raises(ValueError, match=message):
        filled().window(lo, hi)


def test_the_first_window_starts_at_the_first_position():
    with pytest.raises(ValueError, match=r"The first window must start at position 0, got \[2\]"):
        FreeCache(canvas_length=6).window(2, 6)


def test_the_first_forward_cannot_be_scattered():
    with pytest.raises(ValueError, match="first"):
        FreeCache(canvas_length=6).scatter(torch.tensor([[0, 1], [0, 2]]))


def test_states_land_at_the_window_and_in_the_same_memory():
    cache = filled()
    addresses = [cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()]
    cache.window(2, 4, attended=5)
    keys, values = cache.update(states(52, 54), -states(52, 54), 0)
    assert keys.flatten().tolist() == [0, 1, 52, 53, 4] and values.flatten().tolist() == [0, -1, -52, -53, -4]
    cache.scatter(torch.tensor([[5, 3]]))
    keys, _ = cache.update(states(65, 67), states(65, 67), 0)
    assert keys.flatten().tolist() == [0, 1, 52, 66, 4, 65]
    assert [cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()] == addresses


def test_a_model_is_told_where_its_window_starts_and_how_many_keys_it_sees():
    cache = FreeCache()
    assert (cache.get_seq_length(), cache.canvas_length) == (0, None)
    cache.update(states(0, 6), states(0, 6), 0)
    assert (cache.get_seq_length(), cache.get_mask_sizes(6, 0), cache.get_max_length()) == (0, (6, 0), 6)
    cache.window(3, 5)
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 0)) == (3, (6, 0))
    cache.window(2, 4, attended=5)
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 0)) == (2, (5, 0))
    cache.scatter(torch.tensor([[5, 1]]))
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 0)) == (0, (6, 0)), "the starts of the rows differ"


# Rows


@pytest.mark.parametrize("change", ["batch_select_indices", "reorder_cache"])
def test_rows_are_kept_in_the_order_asked_with_their_frozen_lengths(change):
    cache = filled(batch_size=3)
    cache.freeze(torch.tensor([1, 2, 3]))
    cache.window(3, 6)
    getattr(cache, change)(torch.tensor([2, 0]))
    assert [kept(cache, row)[0] for row in (0, 1)] == [200, 0]
    assert cache.layers[0].values[:, 0, 1, 0].tolist() == [-201, -1]
    assert cache.frozen_length.tolist() == [3, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_any_choice_of_rows_is_that_of_an_index(indices):
    cache = filled(batch_size=5)
    expected = cache.layers[0].keys[indices]
    cache.batch_select_indices(torch.tensor(indices))
    assert torch.equal(cache.layers[0].keys, expected) and torch.equal(cache.layers[0].values, -expected)


def test_rows_that_take_the_places_of_others_are_all_that_is_moved():
    cache = filled(batch_size=4)
    before = cache.layers[0].keys
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    assert cache.layers[0].keys.data_ptr() == before.data_ptr()
    assert [kept(cache, row)[0] for row in range(3)] == [0, 300, 200]


def test_repeated_rows_stand_side_by_side_with_their_frozen_lengths():
    cache = filled(batch_size=2)
    cache.freeze(torch.tensor([1, 2]))
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [0, 0, 100, 100]
    assert cache.frozen_length.tolist() == [1, 1, 2, 2]


def test_a_length_for_the_whole_batch_outlives_the_rows():
    cache = filled(batch_size=3)
    cache.freeze(4)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.frozen_length.tolist() == [4] and kept(cache, row=1) == [100, 101, 102, 103, 104, 105]


def test_a_reset_cache_is_a_fresh_one():
    cache = filled()
    cache.freeze(4)
    cache.window(4, 5, attended=5)
    cache.reset()
    assert (cache.is_initialized, cache.canvas_length, cache.get_seq_length()) == (False, None, 0)
    cache.update(states(0, 3, 2), states(0, 3, 2), 0)
    assert kept(cache, row=1) == [100, 101, 102] and cache.get_mask_sizes(3, 0) == (3, 0)


def test_cropping_is_refused():
    cache = filled()
    with pytest.raises(NotImplementedError, match=r"cannot be cropped: call `window` .* got `crop\(-1\)`"):
        cache.crop(-1)
    assert not cache.layers[0].is_croppable


def test_it_says_that_it_keeps_positions():
    assert FreeCache.keeps_positions, "`generate` recognizes a cache that it may use by this attribute"


@given(st.data())
def test_a_cache_is_a_dictionary_from_positions_to_their_last_states(data):
    """Random windows, scattered positions, freezes and thaws, beside one dictionary per row."""
    length, batch_size = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    cache = FreeCache()
    cache.update(states(0, length, batch_size), states(0, length, batch_size), 0)
    reference = [{position: 100 * row + position for position in range(length)} for row in range(batch_size)]
    frozen = [0] * batch_size
    for value in range(1000, 1000 + data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["window", "scatter", "freeze", "thaw"])):
            case "freeze":
                frozen = [data.draw(st.integers(low, length)) for low in frozen]
                cache.freeze(torch.tensor(frozen))
                continue
            case "thaw":
                frozen = [0] * batch_size
                cache.thaw()
                continue
            case "window" if max(frozen) < length:
                lo = data.draw(st.integers(max(frozen), length - 1))
                hi = data.draw(st.integers(lo + 1, length))
                cache.window(lo, hi)
                written = [list(range(lo, hi))] * batch_size
            case "scatter" if max(frozen) < length:
                count = data.draw(st.integers(1, length))
                written = [[data.draw(st.integers(low, length - 1)) for _ in range(count)] for low in frozen]
                cache.scatter(torch.tensor(written))
            case _:
                continue
        new = torch.full((batch_size, 1, len(written[0]), 1), float(value))
        cache.update(new, new, 0)
        for row, positions in enumerate(written):
            reference[row] |= dict.fromkeys(positions, value)
    for row in range(batch_size):
        assert kept(cache, row) == list(reference[row].values())
