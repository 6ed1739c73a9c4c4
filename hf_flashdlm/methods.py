"""The published decoding methods, one line of settings each.

Owns the settings of each name in `generate(method=...)`. Knows nothing of how an option is used.
"""

from typing import Any


# Options that the caller gives win over those of the method. All methods stop at the end of the text; with
# `stop_at_eos=False` they fill the canvas, as most of the original implementations do.
METHODS: dict[str, dict[str, Any]] = {
    # One token per step, unless `steps` says otherwise.
    "llada": {"window_policy": "none", "schedule": "uniform"},
    "dream": {"window_policy": "none", "schedule": "timesteps", "confidence": "entropy", "blocks": "whole"},
    "dkv-cache": {"window_policy": "dkv", "schedule": "uniform"},
    "freecache": {"window_policy": "freecache", "schedule": "uniform"},
    # Every token that is probable enough is written.
    "fast-dllm": {"window_policy": "none", "confidence_threshold": 0.9},
    "fast-dllm-prefix": {"window_policy": "prefix", "confidence_threshold": 0.9},
    "fast-dllm-dual": {"window_policy": "dual", "confidence_threshold": 0.9},
    "adablock": {"window_policy": "dual", "confidence_threshold": 0.9, "blocks": "adaptive"},
    "eb-sampler": {"window_policy": "none", "entropy_bound": 0.1},
    # Of models with block-causal attention, which recommend them.
    "sdar": {"window_policy": "freecache", "confidence_threshold": 0.85},
    "bd3lm": {"window_policy": "freecache", "schedule": "linear"},
    "llada2": {"window_policy": "freecache", "confidence_threshold": 0.95},
    "llada2.1": {"window_policy": "freecache", "confidence_threshold": 0.7, "editing_threshold": 0.5},
    "fast-dllm-v2": {
        "window_policy": "freecache",
        "confidence_threshold": 0.9,
        "block_length": 8,
        "first_token_alone": True,
    },
    # With a `guider`, the tokens that it accepts are written; without it, every token that is probable enough.
    "flashdlm": {"window_policy": "freecache"},
    # Recommended with a guider: only the next masks are computed and seen, and text is frozen when it is finished.
    "flashdlm-fast": {
        "window_policy": "freecache",
        "grow_canvas": True,
        "block_length": 32,
        "right_window": 12,
        "freeze_length": 1,
    },
}
