"""The loss of masked diffusion.

Owns the weighted cross-entropy, how a model's forward takes the weights, and the warning about labels that do not
belong to a masked diffusion. Knows nothing of how positions come to be masked.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch.compiler import is_compiling
from torch.nn.functional import cross_entropy, pad
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging


logger = logging.get_logger(__name__)

IGNORED = -100  # the label of a position that is not scored


def takes_loss_weights(forward: Callable) -> Callable:
    """
    Decorate the forward of a masked diffusion model, so that it takes `loss_weights`, which have the shape of `labels`
    and weight the cross-entropy of each, see [`DataCollatorForMaskedDiffusion`].
    """

    @wraps(forward)
    def with_loss_weights(self, *args, loss_weights=None, **kwargs):
        labels = kwargs.get("labels")
        if labels is not None:
            check_labels(self, args[0] if args else kwargs.get("input_ids"), labels)
        if labels is None or loss_weights is None:
            return forward(self, *args, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = forward(self, *args, **kwargs | {"labels": None})
        loss = weighted_loss(outputs[0], labels, loss_weights, getattr(self.config, "logits_shift", 0), num_items)
        if isinstance(outputs, tuple):
            return (loss, *outputs)
        outputs.loss = loss
        return outputs

    return with_loss_weights


def declare_shift(model_class: type) -> None:
    """Tell the `Trainer` that the labels of a model are shifted, which it has to know when it smooths them."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_class.__name__] = model_class.__name__  # it looks for the value only


def weighted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor,
    logits_shift: int = 0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    r"""
    The mean of the weighted cross-entropy over the positions that have a label.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Of the model, in any precision.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): In place, -100 where there is none.
        loss_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): Factor of each position, in place.
        logits_shift (`int`): The logits at position i score position i + `logits_shift`.
        num_items_in_batch (`int`, *optional*):
            What the sum is divided by, as the `Trainer` passes it when it accumulates gradients; by default the number
            of labels.
    """
    labels, loss_weights = labels.to(logits.device), loss_weights.to(logits.device, torch.float32)
    if logits_shift:
        labels = pad(labels, (0, logits_shift), value=IGNORED)[:, logits_shift:]
        loss_weights = pad(loss_weights, (0, logits_shift))[:, logits_shift:]
    losses = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    count = torch.as_tensor(count, device=losses.device).clamp_min(1)
    return (losses * loss_weights.flatten()).sum() / count


def check_labels(model, input_ids: torch.Tensor | None, labels: torch.Tensor) -> None:
    """Warn, at the first labels that a model is given, if none of them is that of a mask token."""
    mask_token_id = getattr(model.config, "mask_token_id", None)
    if is_compiling() or getattr(model, "has_seen_labels", False) or input_ids is None or mask_token_id is None:
        return
    model.has_seen_labels = True
    is_labelled = labels != IGNORED
    if is_labelled.shape == input_ids.shape and is_labelled.any():
        if not (is_labelled & (input_ids == mask_token_id)).any():
            logger.warning(
                f"None of the `labels` belongs to a mask token ({mask_token_id}) in `input_ids`: "
                f"{type(model).__name__} sees the tokens that it is trained to predict and learns to copy them. Mask "
                "the inputs, for instance with `DataCollatorForMaskedDiffusion`."
            )
