"""Decoding loops that do the work of the public implementations in each step, for comparison with this package.

* `llada`: `generate` of https://github.com/ML-GSAI/LLaDA/blob/main/generate.py. All positions go through the output
  head; noise is drawn for all their scores in float64, although at temperature 0 it changes nothing, before the
  maximum over the vocabulary is taken; then comes a softmax of all of them in float64.
* `fastdllm_plain`, `fastdllm_prefix`, `fastdllm_dual`: `generate`, `generate_with_prefix_cache` and
  `generate_with_dual_cache` of https://github.com/NVlabs/Fast-dLLM/blob/main/llada/generate.py. The same work
  for the positions that are fed, without noise; with the prefix cache the maximum is taken twice. A threshold is
  compared with each candidate in turn. The prefix cache cuts the keys and values of the full forward at the block, and
  each forward appends to it; the dual cache writes into those of the full forward, row by row.
* `flashdlm_freecache`: `generate_block_cached` of
  https://github.com/ZhanqiuHu/flash-dlm-experimental/blob/main/src/model/llada_v2/generate.py. Keys and values are
  written into buffers after those of finished blocks, which the last step of a block freezes before its token is
  written. It decodes one prompt after another.

Only the loops are compared: both sides use the model code of this package. The original model code does more (it
rotates all cached keys in each forward; that of FlashDLM keeps queries, too). The loops take prompts of one length,
fill the canvas and write the most confident token in each step or, with `threshold`, all tokens of at least this
probability, and at least one.

The originals are for LLaDA. For Dream's shifted logits, which are not copied here, a cached block is fed from the
position before it as long as its first token is masked in any row. The package decides this for each row alone, so in
a batch the tokens of a few rows may differ.

`flashdlm bench --reference tests/reference.py` times them beside the methods of the package.
"""

from functools import partial

import torch
from transformers import DynamicCache

from hf_flashdlm.compiling import CACHE_NAME


@torch.no_grad()
def llada(model, input_ids, max_new_tokens, block_length):
    """LLaDA's low-confidence order (https://arxiv.org/abs/2502.09992, algorithm 5)."""
    canvas = _start(model, input_ids, max_new_tokens)
    for start, stop in _blocks(input_ids, canvas, block_length):
        for _ in range(start, stop):
            _write(model, canvas, model(canvas, use_cache=False).logits, 0, stop, noisy=True)
    return canvas


@torch.no_grad()
def fastdllm_plain(model, input_ids, max_new_tokens, block_length, threshold=None):
    """Fast-dLLM without its caches (https://arxiv.org/abs/2505.22618, algorithm 1)."""
    canvas = _start(model, input_ids, max_new_tokens)
    for start, stop in _blocks(input_ids, canvas, block_length):
        while _has_masks(model, canvas, start, stop):
            _write(model, canvas, model(canvas, use_cache=False).logits, 0, stop, threshold)
    return canvas


@torch.no_grad()
def fastdllm_prefix(model, input_ids, max_new_tokens, block_length, threshold=None):
    """Fast-dLLM's prefix cache (section 3.2): a full forward for each block, then forwards from the block on."""
    canvas = _start(model, input_ids, max_new_tokens)
    for start, stop in _blocks(input_ids, canvas, block_length):
        cache = DynamicCache()
        logits = model(canvas, **{CACHE_NAME: cache}, use_cache=True).logits
        _write(model, canvas, logits, 0, stop, threshold)
        while _has_masks(model, canvas, start, stop):
            first = _first(model, canvas, start)
            cache.crop(first - cache.get_seq_length())
            logits = _forward(model, canvas, first, None, cache)
            logits.argmax(-1)
            _write(model, canvas, logits, first, stop, threshold)
    return canvas


@torch.no_grad()
def fastdllm_dual(model, input_ids, max_new_tokens, block_length, threshold=None):
    """Fast-dLLM's dual cache (section 3.2): a full forward for each block, then forwards of the block alone."""
    canvas = _start(model, input_ids, max_new_tokens)
    for start, stop in _blocks(input_ids, canvas, block_length):
        cache = ReplacingCache()
        logits = model(canvas, **{CACHE_NAME: cache}, use_cache=True).logits
        _write(model, canvas, logits, 0, stop, threshold)
        while _has_masks(model, canvas, start, stop):
            first = _first(model, canvas, start)
            cache.replaced = torch.zeros_like(canvas, dtype=torch.bool)
            cache.replaced[:, first:stop] = True
            _write(model, canvas, _forward(model, canvas, first, stop, cache), first, stop, threshold)
    return canvas


@torch.no_grad()
def flashdlm_freecache(model, input_ids, max_new_tokens, block_length):
    """FlashDLM's FreeCache (https://arxiv.org/abs/2505.21467, algorithm 1): a full forward, then from the block on."""
    if len(input_ids) > 1:  # the original's canvas has one row
        return torch.cat([flashdlm_freecache(model, row[None], max_new_tokens, block_length) for row in input_ids])
    canvas = _start(model, input_ids, max_new_tokens)
    cache = BlockCache(canvas.shape[1])
    for start, stop in _blocks(input_ids, canvas, block_length):
        for _ in range(start, stop):
            cache.clean = first = _first(model, canvas, start) if cache.layers else 0
            _write(model, canvas, _forward(model, canvas, first, None, cache), first, stop)
    return canvas


class ReplacingCache(DynamicCache):
    """New states replace those at `replaced` of shape (B, L); without it they are appended."""

    replaced = None

    def get_mask_sizes(self, query_length, layer_idx):
        if self.replaced is None:
            return super().get_mask_sizes(query_length, layer_idx)
        return self.replaced.shape[1], 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.replaced is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = self.layers[layer_idx].keys, self.layers[layer_idx].values
        for row, places in enumerate(self.replaced):
            positions = places.nonzero(as_tuple=True)[0]
            keys[row, :, positions] = key_states[row]
            values[row, :, positions] = value_states[row]
        return keys, values


class BlockCache(DynamicCache):
    """New states are written after the first `clean` positions of buffers of `length`."""

    def __init__(self, length):
        super().__init__()
        self.length, self.clean = length, 0

    def get_mask_sizes(self, query_length, layer_idx):
        return self.clean + query_length, 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == len(self.layers):
            shape = (*key_states.shape[:2], self.length, key_states.shape[3])
            super().update(key_states.new_zeros(shape), value_states.new_zeros(shape), layer_idx)
        keys, values = self.layers[layer_idx].keys, self.layers[layer_idx].values
        stop = self.clean + key_states.shape[2]
        keys[:, :, self.clean : stop] = key_states
        values[:, :, self.clean : stop] = value_states
        return keys[:, :, :stop], values[:, :, :stop]


def _start(model, input_ids, max_new_tokens):
    masks = torch.full((len(input_ids), max_new_tokens), model.config.mask_token_id, device=input_ids.device)
    return torch.cat([input_ids, masks], 1)


def _blocks(input_ids, canvas, block_length):
    starts = range(input_ids.shape[1], canvas.shape[1], block_length)
    return [(start, min(start + block_length, canvas.shape[1])) for start in starts]


def _shift(model):
    return getattr(model.config, "logits_shift", 0)  # Dream's logits at a position score the next token


def _has_masks(model, canvas, start, stop):
    return bool((canvas[:, start:stop] == model.config.mask_token_id).any())


def _first(model, canvas, start):
    """The first position to feed for a block: with shifted logits, the one before it if its first token is masked."""
    return start - _shift(model) if _shift(model) and _has_masks(model, canvas, start, start + 1) else start


def _forward(model, canvas, first, stop, cache):
    positions = torch.arange(canvas.shape[1], device=canvas.device)[None, first:stop].expand(len(canvas), -1)
    return model(canvas[:, first:stop], position_ids=positions, **{CACHE_NAME: cache}, use_cache=True).logits


def _write(model, canvas, logits, first, stop, threshold=None, noisy=False):
    """Write the most probable candidates of the masks before `stop`; the logits begin at position `first`."""
    shift = _shift(model)
    scores = logits[:, : logits.shape[1] - shift] if shift else logits
    fed = canvas[:, first + shift : first + shift + scores.shape[1]]
    if noisy:
        noise = torch.rand_like(scores, dtype=torch.float64)
        token_ids = (scores.double().exp() / (-noise.log()) ** 0).argmax(-1)
    else:
        token_ids = scores.argmax(-1)
    confidence = scores.double().softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    masked = fed == model.config.mask_token_id
    masked[:, stop - first - shift :] = False
    token_ids = torch.where(masked, token_ids, fed)
    confidence = torch.where(masked, confidence, -torch.inf)
    chosen = torch.zeros_like(masked)
    for row, count in enumerate(masked.sum(1)):
        best = confidence[row].topk(min(1, count) if threshold is None else count).indices
        chosen[row, best] = True
        for position in best[1:] if threshold is not None else ():
            if confidence[row, position] < threshold:
                chosen[row, position] = False
    fed[chosen] = token_ids[chosen]


# Read by `flashdlm bench`: the loops by name, and the options of `generate` that write the same tokens.
_SURE = {"confidence_threshold": 0.9}
METHODS = {
    "LLaDA": (llada, {"window_policy": "none"}),
    "Fast-dLLM prefix": (fastdllm_prefix, {"window_policy": "prefix"}),
    "Fast-dLLM dual": (fastdllm_dual, {"window_policy": "dual"}),
    "FlashDLM freecache": (flashdlm_freecache, {"window_policy": "freecache", "freeze_lag": 0}),
    "Fast-dLLM plain+threshold": (partial(fastdllm_plain, threshold=0.9), _SURE | {"window_policy": "none"}),
    "Fast-dLLM prefix+threshold": (partial(fastdllm_prefix, threshold=0.9), _SURE | {"window_policy": "prefix"}),
    "Fast-dLLM dual+threshold": (partial(fastdllm_dual, threshold=0.9), _SURE | {"window_policy": "dual"}),
}
