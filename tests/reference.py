"""Decoding loops as the papers state them, one after another and as slowly: what ours is compared with.

For one prompt or several of one length, with the model's public forward and the host's own cache. They fill the whole
canvas. `flashdlm bench --reference tests/reference.py` times them beside ours.
"""

import torch
from transformers import DynamicCache


@torch.no_grad()
def llada(model, input_ids, max_new_tokens, block_length):
    """LLaDA's low-confidence order, one token per step (https://arxiv.org/abs/2502.09992, algorithm 5)."""
    canvas = _start(model, input_ids, max_new_tokens)
    for start, stop in _blocks(input_ids.shape[1], canvas.shape[1], block_length):
        for _ in range(stop - start):
            _write(model, canvas, start, stop, model(canvas, use_cache=False).logits)
    return canvas


@torch.no_grad()
def fastdllm_prefix(model, input_ids, max_new_tokens, block_length, dual=False):
    """Fast-dLLM's prefix cache: a full forward for each block, then from its start on, or (dual) the block alone."""
    canvas = _start(model, input_ids, max_new_tokens)
    positions = torch.arange(canvas.shape[1], device=canvas.device)
    for start, stop in _blocks(input_ids.shape[1], canvas.shape[1], block_length):
        full = DynamicCache()
        _write(model, canvas, start, stop, model(canvas, past_key_values=full, use_cache=True).logits)
        first = start - _shift(model)
        fed = positions[first : stop if dual else None]
        kept = positions[~torch.isin(positions, fed)]  # attention does not mind in which order keys stand
        for _ in range(stop - start - 1):
            cache = DynamicCache([(layer.keys[:, :, kept], layer.values[:, :, kept]) for layer in full.layers])
            rows = fed.expand(len(canvas), -1)
            logits = model(canvas[:, fed], position_ids=rows, past_key_values=cache, use_cache=True).logits
            _write(model, canvas, start, stop, logits, first)
    return canvas


def fastdllm_dual(model, input_ids, max_new_tokens, block_length):
    """Fast-dLLM's dual cache (https://arxiv.org/abs/2505.22618, section 3.2)."""
    return fastdllm_prefix(model, input_ids, max_new_tokens, block_length, dual=True)


@torch.no_grad()
def flashdlm_freecache(model, input_ids, max_new_tokens, block_length):
    """FreeCache as the paper states it: one full forward, then all behind the finished blocks, which stay frozen."""
    canvas = _start(model, input_ids, max_new_tokens)
    positions = torch.arange(canvas.shape[1], device=canvas.device)
    cache = DynamicCache()
    logits, first = model(canvas, past_key_values=cache, use_cache=True).logits, 0
    for start, stop in _blocks(input_ids.shape[1], canvas.shape[1], block_length):
        for _ in range(stop - start):
            if logits is None:
                first = start - _shift(model)
                cache.crop(first - cache.get_seq_length())
                rows = positions[first:].expand(len(canvas), -1)
                logits = model(canvas[:, first:], position_ids=rows, past_key_values=cache, use_cache=True).logits
            _write(model, canvas, start, stop, logits, first)
            logits = None
    return canvas


def _start(model, input_ids, max_new_tokens):
    masks = torch.full((len(input_ids), max_new_tokens), model.config.mask_token_id, device=input_ids.device)
    return torch.cat([input_ids, masks], 1)


def _blocks(prompt_length, canvas_length, block_length):
    starts = range(prompt_length, canvas_length, block_length)
    return [(start, min(start + block_length, canvas_length)) for start in starts]


def _shift(model):
    return getattr(model.config, "logits_shift", 0)  # of Dream: its output at a position scores the next


def _write(model, canvas, start, stop, logits, first=0):
    """Write the most probable candidate of the masks in `[start, stop)`; the logits begin at position `first`."""
    mask_token_id = model.config.mask_token_id
    begin = start - _shift(model) - first
    logits = logits[:, begin : begin + stop - start].double()
    logits[..., mask_token_id] = -torch.inf
    confidence, token_ids = logits.softmax(-1).max(-1)
    best = confidence.masked_fill(canvas[:, start:stop] != mask_token_id, -1).argmax(1, keepdim=True)
    canvas[:, start:stop] = canvas[:, start:stop].scatter(1, best, token_ids.gather(1, best))


METHODS = {
    "reference plain": llada,
    "reference prefix": fastdllm_prefix,
    "reference dual": fastdllm_dual,
    "reference freecache": flashdlm_freecache,
}
