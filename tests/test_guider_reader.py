"""Reading by any autoregressive model: the same with and without a cache, for all decisions; or a clear refusal."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_flashdlm import ARGuider
from hf_flashdlm.compiling import CACHE_NAME


MASK, V, LENGTH = 511, 512, 26
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=LENGTH,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=None, eos_token_id=None)
GEMMA3N = dict(
    vocab_size_per_layer_input=V,
    hidden_size_per_layer_input=8,
    laurel_rank=8,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    activation_sparsity_pattern=[0.0] * 4,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
# Sliding windows are narrower than the canvas and, with one exception, than the tokens of a step.
CAUSAL = {
    "qwen2": ("qwen2", SIZES),
    "qwen2, half of the layers with a window": (
        "qwen2", SIZES | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "qwen3": ("qwen3", SIZES),
    "llama 3": ("llama", SIZES | dict(rope_parameters=ROPE)),
    "smollm2": ("llama", SIZES | dict(tie_word_embeddings=True)),
    "gpt2": ("gpt2", GPT2),
    "mistral": ("mistral", SIZES | dict(sliding_window=6)),
    "mistral, a window of all but the end": ("mistral", SIZES | dict(sliding_window=20)),
    "gemma2": ("gemma2", SIZES | dict(sliding_window=6, query_pre_attn_scalar=8)),
    "gemma3": ("gemma3_text", SIZES | dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])),
    "gemma3n, two layers with the states of others": ("gemma3n_text", SIZES | GEMMA3N | dict(sliding_window=6)),
}  # fmt: skip


def make(kind, options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()


@pytest.fixture(scope="module", params=CAUSAL.values(), ids=CAUSAL)
def model(request):
    return make(*request.param)


class Compared(ARGuider):
    """A guider that accepts at random, and compares its scores with those of each row read alone and in one piece."""

    def __init__(self, model, generator, **options):
        super().__init__(model, **options)
        self.source, self.compared = generator, 0

    def _accept(self, logits, drafts):
        return torch.rand(drafts.shape, generator=self.source) < 0.7

    def reset(self, *args, **kwargs):
        super().reset(*args, **kwargs)
        self.read, self.reader.read = self.reader.read, self.compare

    @torch.no_grad()
    def compare(self, input_ids, drafts, positions, frontier, judged):
        logits = self.read(input_ids, drafts, positions, frontier, judged)
        current = input_ids.gather(1, positions)
        canvas = input_ids.scatter(1, positions, torch.where(current == MASK, drafts, current))
        for row, places in enumerate(positions.tolist()):
            begin = int(self.reader.canvas_mask[row].argmax())
            alone = self.model(canvas[row : row + 1, begin:], use_cache=False).logits[0]
            for slot, place in enumerate(places):
                if place >= max(int(frontier[row]), begin + 1):
                    torch.testing.assert_close(logits[row, slot], alone[place - 1 - begin], atol=1e-5, rtol=1e-4)
                    self.compared += 1
        return logits


def random_canvas(generator):
    """Three rows with different prompts, one of them with a hole, followed by masks and a few known tokens."""
    canvas = torch.randint(2, MASK, (3, LENGTH), generator=generator)
    prompts = torch.randint(1, 10, (3,), generator=generator)
    padding = torch.randint(0, 3, (3,), generator=generator)
    masked = torch.arange(LENGTH) >= (padding + prompts)[:, None]
    masked &= torch.rand(canvas.shape, generator=generator) < 0.9
    masked[:, -1] = True
    masked[0, padding[0] + 1] = True
    mask = (torch.arange(LENGTH) >= padding[:, None]).long()
    return torch.where(masked & (mask > 0), MASK, canvas) * mask, mask


def live_through(guider, generator):
    """A history as in the loop: accepted drafts are written, rows leave when they are finished, or earlier."""
    canvas, mask = random_canvas(generator)
    guider.reset(SimpleNamespace(config=guider.model.config), mask, MASK)
    while len(canvas):
        masked = canvas == MASK
        frontier = masked.int().argmax(1)
        width = min(guider.num_drafts, LENGTH - int(frontier.min()))
        positions = frontier.clamp_max(LENGTH - width)[:, None] + torch.arange(width)
        candidate = masked.gather(1, positions) & (positions >= frontier[:, None])
        candidate &= positions < frontier[:, None] + guider.num_drafts
        scores = torch.randn(*positions.shape, V, generator=generator)
        judged = guider(canvas, scores, positions=positions, frontier=frontier, candidate=candidate)
        drafts = judged.argmax(-1)
        current = canvas.gather(1, positions)
        canvas = canvas.scatter(1, positions, torch.where(candidate & (drafts != MASK), drafts, current))
        stays = (canvas == MASK).any(1) & (torch.rand(len(canvas), generator=generator) < 0.95)
        if not stays.all():
            canvas = canvas[stays]
            guider.batch_select_indices(stays.nonzero().squeeze(1))


@pytest.mark.parametrize("num_drafts", [32, 5, 1])
def test_what_is_read_with_a_cache_is_what_each_row_reads_alone(model, num_drafts):
    for seed in range(2):  # of 11 models and 3 numbers of drafts: 66 histories
        generator = torch.Generator().manual_seed(seed)
        guider = Compared(model, generator, num_drafts=num_drafts)
        live_through(guider, generator)
        assert guider.compared > 3


def test_a_guider_with_windows_judges_a_whole_decode(tiny, decode):
    windowed = make(*CAUSAL["gemma3"])
    options = dict(guider=windowed, max_new_tokens=16, stop_at_eos=False, pad_token_id=0)
    output = decode(tiny("dream_trained"), [[5, 70, 200], [41, 333, 62, 90, 8]], **options)
    assert not (output.sequences == MASK).any()


# --- what cannot be a guider -----------------------------------------------------------------------------------------

CONV = dict(num_hidden_layers=2, layer_types=["conv", "full_attention"])
RECURRENT = {
    "mamba": ("mamba", dict(vocab_size=V, hidden_size=32, num_hidden_layers=1, state_size=4)),
    "lfm2": ("lfm2", SIZES | CONV),
}


@pytest.mark.parametrize(("kind", "options"), RECURRENT.values(), ids=RECURRENT)
def test_a_model_with_recurrent_states_is_refused(tiny, decode, kind, options):
    recurrent = make(kind, options)
    message = (
        f"`guider` must attend to its tokens in every layer, got {type(recurrent).__name__}, whose recurrent states "
        "cannot be taken back when a draft is refused: choose another model."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode(tiny("dream_trained"), [[5, 70]], max_new_tokens=4, guider=recurrent)


def test_a_model_that_sees_what_it_judges_is_refused(tiny, decode):
    message = (
        "`guider` must be autoregressive, got DreamModel, which sees the drafts that it is to judge: choose a causal "
        "language model."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode(tiny("dream_trained"), [[5, 70]], max_new_tokens=4, guider=tiny("dream_trained"))


def test_a_model_without_a_cache_is_refused(tiny, decode):
    old = make("openai-gpt", dict(vocab_size=V, n_embd=32, n_layer=1, n_head=4))
    message = f"`guider` must take `{CACHE_NAME}` in its forward, which OpenAIGPTLMHeadModel does not: choose another"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} model\\.$"):
        decode(tiny("dream_trained"), [[5, 70]], max_new_tokens=4, guider=old)


def test_a_canvas_longer_than_the_guider_has_positions_for_is_refused(tiny, decode):
    short = make("gpt2", GPT2 | dict(n_positions=8))
    message = (
        "`guider` must have positions for the 9 tokens that it reads, got a model of 8: shorten `max_new_tokens` or "
        "the prompt."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode(tiny("dream_trained"), [[5, 70], [7]], max_new_tokens=7, guider=short)
    output = decode(tiny("dream_trained"), [[5, 70], [7]], max_new_tokens=6, guider=short, pad_token_id=0)
    assert output.guider_forwards.all()
