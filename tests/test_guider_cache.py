"""What the guider keeps from step to step: its cache, and nothing that waits for the device."""

import pytest
import torch
from cases import ENDS, MASK, PROMPTS
from guided_cases import FILLED, OPTIONS, Decided, alphabet_guider, always, judge, random

from hf_flashdlm import ARGuider
from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.guider_gate import Gate


# --- its cache -------------------------------------------------------------------------------------------------------


class Caching(Decided):
    """Keeps what its reader reads."""

    def reset(self, *args, **kwargs):
        super().reset(*args, **kwargs)
        read = self.reader.read

        def kept(*places):
            self.before_read()
            self.logits.append(read(*places))
            return self.logits[-1]

        self.reader.read = kept

    def before_read(self):
        pass


class Recomputing(Caching):
    """Forgets its cache before every forward, and so reads everything anew."""

    def before_read(self):
        self.reader.cache.crop(-self.reader.cache.get_seq_length())
        self.reader.committed = 0


@pytest.mark.parametrize("seed", range(24))
def test_after_any_history_the_cache_holds_the_committed_prefix(tiny, decode, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        torch.randint(70, 500, (int(length),), generator=generator).tolist()
        for length in torch.randint(1, 9, (3,), generator=generator)
    ]
    if seed % 4 == 0:
        prompts[1][len(prompts[1]) // 2] = MASK
    outputs, logits = [], []
    for kind in (Caching, Recomputing):
        judge = kind(tiny("guider"), random(seed, 0.75), num_drafts=(32, 5, 1)[seed % 3])
        judge.logits = []
        options = OPTIONS | dict(max_new_tokens=24, eos_token_id=ENDS, window_policy=("freecache", "none")[seed % 2])
        outputs.append(decode(tiny("dream_trained"), prompts, guider=judge, **options))
        logits.append(judge.logits)
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    assert outputs[0].accepted_lengths == outputs[1].accepted_lengths
    for cached, recomputed in zip(*logits, strict=True):
        # The first position of a canvas is scored by nothing.
        torch.testing.assert_close(cached, recomputed, atol=2e-4, rtol=1e-3)


def test_every_forward_reads_from_the_last_committed_token_on(tiny, decode, decided):
    judge, read = decided(random(7)), []
    hook = tiny("guider").register_forward_pre_hook(
        lambda _, args, kwargs: read.append((kwargs[CACHE_NAME].get_seq_length(), kwargs["input_ids"].shape[1])),
        with_kwargs=True,
    )
    try:
        output = decode(tiny("dream_trained"), [PROMPTS[0]], guider=judge, **FILLED | dict(max_new_tokens=24))
    finally:
        hook.remove()
    assert len(read) == int(output.guider_forwards[0]) > 4
    written = torch.tensor([max(length, 1) for length in output.accepted_lengths[0]]).cumsum(0)
    # The forward before had seen the frontier then; one token more than is new is read, to score the first.
    frontiers = [8] + (8 + written).tolist()
    assert [cached for cached, _ in read] == [0] + [frontier - 1 for frontier in frontiers[: len(read) - 1]]
    assert all(cached + fed == 31 for cached, fed in read)


def test_a_canvas_that_was_not_announced_is_noticed():
    canvas, positions = torch.tensor([[1, 2, 3, 0, 0]]), torch.arange(3, 5)[None]
    guider = alphabet_guider(always)
    judge(guider, canvas, torch.zeros(1, 2, 6), positions, 3)
    with pytest.raises(
        RuntimeError, match="^`frontier` must not move back from one call to the next, got 2 after 3: `reset`"
    ):
        judge(guider, canvas, torch.zeros(1, 2, 6), positions, 2)


def test_a_prefix_that_was_changed_is_noticed():
    canvas, positions = torch.tensor([[1, 2, 3, 0, 0]]), torch.arange(3, 5)[None]
    guider = alphabet_guider(always)
    judge(guider, canvas, torch.zeros(1, 2, 6), positions, 3)
    judge(guider, canvas, torch.zeros(1, 2, 6), positions, 3)
    assert guider.statistics(total_seconds=1.0)["guider_forwards"].tolist() == [2]
    canvas[0, 1] = 5
    judge(guider, canvas, torch.zeros(1, 2, 6), positions, 3)
    with pytest.raises(
        RuntimeError, match="^The canvas left of the frontier has changed between two calls: `reset` the guider"
    ):
        guider.statistics(total_seconds=1.0)


def test_a_guider_that_is_used_again_remembers_nothing(tiny, decode, guider):
    judge = guider(accept="topk", top_k=5)
    first = decode(tiny("dream_trained"), PROMPTS, guider=judge, **OPTIONS)
    decode(tiny("dream_trained"), [[9] * 30], guider=judge, **OPTIONS)
    again = decode(tiny("dream_trained"), PROMPTS, guider=judge, **OPTIONS)
    for field in ("sequences", "nfe", "guider_forwards", "drafts_judged", "drafts_accepted"):
        assert again[field].tolist() == first[field].tolist()
    assert first.accepted_lengths == again.accepted_lengths


def test_the_counts_of_an_output_are_its_own(tiny, decode, guider):
    judge = guider()
    first = decode(tiny("dream_trained"), PROMPTS, guider=judge, **OPTIONS)
    before = (first.guider_forwards.tolist(), [list(lengths) for lengths in first.accepted_lengths])
    decode(tiny("dream_trained"), PROMPTS, guider=judge, **OPTIONS)
    assert (first.guider_forwards.tolist(), first.accepted_lengths) == before


# --- transfers -------------------------------------------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """
    A tensor that counts as being on a device, as does all that is computed from it, until a transfer; it notes each.
    """

    transfers = []
    WAITING = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique"}

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = function.__name__
        by_mask = name == "__getitem__" and any(
            torch.is_tensor(one) and one.dtype == torch.bool and isinstance(one, OnDevice)
            for one in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        result = super().__torch_function__(function, types, args, kwargs or {})
        if name in cls.WAITING or by_mask:
            cls.transfers.append(name)
            return result.as_subclass(torch.Tensor) if torch.is_tensor(result) else result
        return result


class Watched(ARGuider):
    """Believes to be on a device, and counts what it fetches from there in each step, and at the end."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.per_step = []  # shared with the copies that the calls work on

    def reset(self, diffusion_model, canvas_mask, *arguments, **options):
        super().reset(diffusion_model, canvas_mask.as_subclass(OnDevice), *arguments, **options)

    def statistics(self, total_seconds):
        OnDevice.transfers = []
        statistics = super().statistics(total_seconds)
        assert len(OnDevice.transfers) == 2, "the counts, and what the reader looks back at"
        return statistics

    def __call__(self, input_ids, scores, **places):
        OnDevice.transfers = []
        result = super().__call__(input_ids.as_subclass(OnDevice), scores.as_subclass(OnDevice), **places)
        self.per_step.append(list(OnDevice.transfers))
        assert isinstance(result, OnDevice)
        return result.as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    "options", [dict(), dict(gate="auto"), dict(combine="union", beyond_prefix=True), dict(accept="topk")], ids=str
)
def test_a_step_fetches_nothing_from_the_device(tiny, decode, options):
    judge = Watched(tiny("guider"), num_drafts=4, **options)
    # Without padding: for a padded batch the host's own mask waits once, at the first forward.
    decode(tiny("dream_trained"), [PROMPTS[0], PROMPTS[0][::-1]], guider=judge, **FILLED | dict(max_new_tokens=40))
    assert len(judge.per_step) > 9
    verdict = {2 * Gate.TRIAL: ["tolist"]} if judge.gate else {}
    assert {step: fetched for step, fetched in enumerate(judge.per_step) if fetched} == verdict


def test_a_transfer_would_be_noticed(tiny, decode):
    class Looking(Watched):
        def _judge(self, input_ids, *arguments):
            assert (input_ids >= 0).all()
            return super()._judge(input_ids, *arguments)

    judge = Looking(tiny("guider"))
    decode(tiny("dream_trained"), [PROMPTS[0]], guider=judge, **FILLED)
    assert set(map(tuple, judge.per_step)) == {("__bool__",)}
