"""What the tests of whole decodes share: prompts, every window policy, every rule, and an alphabet."""

import pytest
import torch


MASK = 511
ENDS = list(range(1, 70))  # enough that random models end, and at different steps; the pad token 0 is not among them
PROMPTS = [[5, 70, 200, 41, 333, 62, 90, 8], [77, 130, 402, 256], [300, 21, 450]]
PROMPT = PROMPTS[0]
# The fields of an architecture's config for a model as small as can be.
TINY = dict(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
)

POLICIES = {
    "none": dict(window_policy="none"),
    "none-growing": dict(window_policy="none", grow_canvas=True),
    "prefix": dict(window_policy="prefix"),
    "dual": dict(window_policy="dual"),
    "dkv": dict(window_policy="dkv"),
    "dkv-often": dict(window_policy="dkv", refresh_steps=2),
    "freecache": dict(),
    "lag-0": dict(freeze_lag=0),
    "lag-3": dict(freeze_lag=3),
    "short-pieces": dict(freeze_length=2),
    "margin": dict(left_margin=2),
    "narrow": dict(right_window=3),
    "narrow-stale": dict(right_window=3, attend_stale=True),
    "narrow-margin-lag-0": dict(right_window=6, left_margin=1, freeze_lag=0),
    "growing": dict(grow_canvas=True),
    "growing-narrow-stale": dict(grow_canvas=True, right_window=4, attend_stale=True),
    "refresh-blocks": dict(refresh_blocks=2),
    "refresh-entropy": dict(refresh_entropy=1.0),
    "refresh-both-narrow": dict(refresh_blocks=1, refresh_entropy=2.0, right_window=4),
    "synchronous": dict(synchronize_blocks=True),
}
RULES = {
    "steps": dict(steps=9),
    "timesteps": dict(steps=9, schedule="timesteps"),
    "empty-timesteps": dict(steps=9, schedule="timesteps", run_empty_steps=True),
    "margin": dict(steps=9, confidence="margin"),
    "entropy": dict(steps=7, confidence="entropy"),
    "threshold": dict(confidence_threshold=0.6),
    "factor": dict(factor=0.8),
    "frechet": dict(frechet_delta=0.3),
    "entropy-bound": dict(entropy_bound=1.5),
    "default": dict(),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_model = pytest.mark.parametrize("name", ["llada", "dream"])


def cut(text):
    """Ids up to and including the first end token."""
    return text[: next((index + 1 for index, token in enumerate(text) if token in ENDS), len(text))]


def generated(output, row=0, prompt_length=8):
    return output.sequences[row, prompt_length:].tolist()


# A character for every id, so that text and ids correspond. Stop strings of Transformers need some Latin letters.
CHARACTERS = [chr(0x4E00 + token_id) for token_id in range(512)]
CHARACTERS[500:506] = "abcdef"


def spell(token_ids):
    return "".join(CHARACTERS[token_id] for token_id in token_ids)


PLAIN = dict(max_new_tokens=12, block_length=4, stop_at_eos=False, steps=9)


def left_padded(prompts, pad_token_id=0):
    """Ids and attention mask of prompts of different length."""
    longest = max(map(len, prompts))
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
