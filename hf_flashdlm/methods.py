"""The published decoding methods, each a line of settings.

Owns what `generate(method=...)` stands for. Knows nothing of how an option is used.
"""

# An option of the caller's own wins over that of the method. All of them stop at the end of the text; with
# `stop_at_eos=False` they fill the canvas, as most of the original codes do.
METHODS = {
    # One token per step, unless `steps` says otherwise.
    "llada": {"window_policy": "none", "schedule": "uniform"},
    "dream": {"window_policy": "none", "schedule": "timesteps", "confidence": "entropy", "blocks": "whole"},
    "dkv-cache": {"window_policy": "dkv", "schedule": "uniform"},
    "freecache": {"window_policy": "freecache", "schedule": "uniform"},
    # Every token that is probable enough.
    "fast-dllm": {"window_policy": "none", "confidence_threshold": 0.9},
    "fast-dllm-prefix": {"window_policy": "prefix", "confidence_threshold": 0.9},
    "fast-dllm-dual": {"window_policy": "dual", "confidence_threshold": 0.9},
    "adablock": {"window_policy": "dual", "confidence_threshold": 0.9, "blocks": "adaptive"},
    "eb-sampler": {"window_policy": "none", "entropy_bound": 0.1},
    # With a `guider`, what it accepts; without, every token that is probable enough.
    "flashdlm": {"window_policy": "freecache"},
}
