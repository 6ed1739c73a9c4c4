"""The models of a measurement: a checkpoint, or a shape with random weights, with their guiders.

Owns which dtype each place gets. A mistake of the user's is a `ValueError` of one sentence. Knows
nothing of what is measured.
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from ..console.checkpoint import Checkpoint
from ..tiny import FOLDER
from .decoding import Models
from .shapes import GUIDER_SHAPES, SHAPES, TWINS


def load_models(args: argparse.Namespace, device: torch.device, canvas_length: int) -> Models:
    """The models that the arguments name; random weights have positions for a canvas of `canvas_length`."""
    if (args.model is None) == (args.config is None):
        raise ValueError("`--model` or `--config` must be given, and not both: a checkpoint, or a shape.")
    if args.model is not None and args.random_weights:
        raise ValueError("`--random-weights` belongs to `--config`: a checkpoint has weights of its own.")
    plain_dtype = "float32" if device.type == "cpu" else "bfloat16"
    dtype = args.dtype or ("auto" if args.model is not None else plain_dtype)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`--dtype` must be auto or a dtype of torch, got {dtype!r}.")
    if args.random_weights:
        dtype = getattr(torch, plain_dtype if dtype == "auto" else dtype)
        config = (
            AutoConfig.from_pretrained(FOLDER / "dlm") if SHAPES[args.config] is None else named_config(args.config)
        )
        # Nothing was trained, so nothing bounds the positions.
        config.max_position_embeddings = max(config.max_position_embeddings, canvas_length)
        model = random_model(config, dtype, device, args.seed)
        return Models(model, {"guider": random_model(guider_config(args, config), dtype, device, args.seed + 1)})
    if args.config not in (None, "tiny"):
        raise ValueError(f"`--config {args.config}` has no weights: add `--random-weights`, or use `--model`.")
    checkpoint = Checkpoint.load(args.model or str(FOLDER / "dlm"), str(device), dtype)
    guider = args.guider or (str(FOLDER / "guider") if args.config == "tiny" else None)
    return Models.load(checkpoint, {} if guider is None else {"guider": guider}, device, dtype)


def named_config(name: str):
    """The configuration of a shape that is not embedded."""
    model_type, sizes = SHAPES[name]
    return AutoConfig.for_model(model_type, **sizes)


def random_model(config, dtype: torch.dtype, device: torch.device, seed: int):
    """A model of this shape with random weights."""
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def guider_config(args: argparse.Namespace, config):
    """The shape of a guider with random weights, by name."""
    name = args.guider or ("tiny" if args.config == "tiny" else "qwen2.5-1.5b")
    if name not in GUIDER_SHAPES:
        raise ValueError(
            f"`--guider` must be one of {', '.join(GUIDER_SHAPES)} with `--random-weights`, got {name!r}."
        )
    shared = {name: getattr(config, name) for name in ("vocab_size", "max_position_embeddings")}
    if name == "tiny":
        return AutoConfig.from_pretrained(FOLDER / "guider", **shared)
    return Qwen2Config(tie_word_embeddings=True, **shared, **GUIDER_SHAPES[name])


def twin_config(config):
    """The autoregressive model of the same shape: Qwen2 for Dream, Llama for LLaDA."""
    if config.model_type not in TWINS:
        raise ValueError(
            f"`--methods` ar needs a model of type {' or '.join(TWINS)}, got {config.model_type!r}: leave ar out."
        )
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    sizes = {name: getattr(config, name) for name in names}
    # Without an end token it generates as many tokens as it is asked for.
    return AutoConfig.for_model(TWINS[config.model_type], **sizes, eos_token_id=None, pad_token_id=0)
