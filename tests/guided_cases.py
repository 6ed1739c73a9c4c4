"""What the tests of guided decodes share: window policies, options, and a guider that accepts as a test decides."""

from types import SimpleNamespace

import torch
from transformers import AutoConfig

from hf_flashdlm import ARGuider


V = 512
POLICIES = [
    dict(window_policy="none"),
    dict(window_policy="none", grow_canvas=True),
    dict(window_policy="prefix"),
    dict(window_policy="dual"),
    dict(window_policy="dkv"),
    dict(window_policy="dkv", refresh_steps=2),
    dict(),
    dict(freeze_lag=0),
    dict(freeze_lag=2, left_margin=2),
    dict(right_window=5),
    dict(right_window=3, attend_stale=True),
    dict(grow_canvas=True),
    dict(refresh_blocks=1),
    dict(refresh_entropy=1.0),
    dict(synchronize_blocks=True),
]
OPTIONS = dict(max_new_tokens=12, block_length=4, pad_token_id=0)
FILLED = OPTIONS | dict(stop_at_eos=False)


class Decided(ARGuider):
    """A guider that reads as usual but accepts as a test decides."""

    def __init__(self, model, decide, **options):
        super().__init__(model, **options)
        self.decide = decide

    def _accept(self, logits, drafts):
        return self.decide(drafts)


def always(drafts):
    return torch.ones_like(drafts, dtype=torch.bool)


def never(drafts):
    return torch.zeros_like(drafts, dtype=torch.bool)


def random(seed, rate=0.7):
    generator = torch.Generator().manual_seed(seed)
    return lambda drafts: torch.rand(drafts.shape, generator=generator) < rate


def alphabet_guider(decide, **options):
    """A guider of six tokens, 0 the mask, that scores nothing and accepts as a test decides."""
    model = SimpleNamespace(
        forward=lambda cache: None, config=AutoConfig.for_model("qwen2", vocab_size=6), device=torch.device("cpu")
    )
    guider = Decided(model, decide, **options)
    diffusion_model = SimpleNamespace(config=model.config)
    guider.reset(diffusion_model, torch.ones(1, 9, dtype=torch.long), mask_token_id=0)
    guider.reader.forward = lambda logits_to_keep, **_: SimpleNamespace(logits=torch.zeros(1, logits_to_keep, 6))
    return guider


def judge(guider, canvas, scores, positions, frontier):
    """A step of a guider, for a single row."""
    return guider(canvas, scores, positions=positions, frontier=torch.tensor([frontier]))
