"""Batches for the training of masked diffusion language models.

Owns how texts become masked inputs, labels and weights. Knows nothing of models.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .diffusion_loss import IGNORED


@dataclass
class DataCollatorForMaskedDiffusion:
    r"""
    Masks texts for the loss of LLaDA (https://arxiv.org/abs/2502.09992, equation 3, and algorithm 2 for fine-tuning):
    of each text a ratio t, drawn uniformly, is masked, and the cross-entropy of the masked tokens is weighted by
    1 / t.

    A text is a dict with `input_ids` and, optionally, `labels` of the same length: positions whose label is -100, a
    prompt for instance, are never masked. As LLaDA does in fine-tuning, texts are padded on the right with the end
    token, which is learned like any other: the model ends its answers by filling the rest with it. So there is no
    attention mask.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Gives the end token, and the mask token if it has one.
        mask_token_id (`int`, *optional*): By default the tokenizer's.
        logits_shift (`int`, *optional*, defaults to 0):
            `model.config.logits_shift`. Where it is not 0, nothing scores the first tokens: they are never masked.
        smallest_ratio (`float`, *optional*, defaults to 1e-3): The masked ratio is at least this, as in LLaDA's code.
        pad_to_multiple_of (`int`, *optional*): Round the length of the batch up.

    Returns:
        `dict`: `input_ids` with masks, `labels` that hold the tokens under them and -100 elsewhere, and
        `loss_weights`, all of shape `(batch_size, sequence_length)`. The mean of the weighted cross-entropy over the
        labels, which is the loss of the models, is the mean over the texts of the cross-entropy that their masked
        tokens add up to, divided by t and by the number of tokens that could have been masked.

    Raises:
        ValueError: If the tokenizer lacks a token, or a text does not fit its labels.

    Example:

    ```python
    >>> collator = DataCollatorForMaskedDiffusion(tokenizer, logits_shift=model.config.logits_shift)
    >>> Trainer(model, args, train_dataset=texts, data_collator=collator).train()
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int | None = None
    logits_shift: int = 0
    smallest_ratio: float = 1e-3
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if self.mask_token_id is None:
            self.mask_token_id = self.tokenizer.mask_token_id
        if self.mask_token_id is None or self.tokenizer.eos_token_id is None:
            missing = "mask" if self.mask_token_id is None else "end"
            remedy = "pass `mask_token_id`" if self.mask_token_id is None else "set its `eos_token`"
            raise ValueError(f"`tokenizer` must have a token for the {missing}, got none: {remedy}.")
        if not 0 < self.smallest_ratio <= 1:
            raise ValueError(f"`smallest_ratio` must lie above 0 and be at most 1, got {self.smallest_ratio!r}.")

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        input_ids, may_mask = self._pad(features)
        may_mask[:, : self.logits_shift] = False
        num_texts = len(input_ids)
        ratio = 1 - torch.rand(num_texts, 1)  # in (0, 1]
        ratio = (1 - self.smallest_ratio) * ratio + self.smallest_ratio
        masked = may_mask & (torch.rand(input_ids.shape) < ratio)
        weights = masked.sum() / (num_texts * ratio * may_mask.sum(1, keepdim=True).clamp_min(1))
        return {
            "input_ids": input_ids.masked_fill(masked, self.mask_token_id),  # type: ignore[arg-type]  # `__post_init__` sets it
            "labels": input_ids.masked_fill(~masked, IGNORED),
            "loss_weights": weights * masked,
        }

    def _pad(self, features: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of one length, and where they may be masked."""
        texts = [torch.as_tensor(feature["input_ids"], dtype=torch.long) for feature in features]
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(map(len, texts)) // multiple) * multiple
        input_ids = torch.full((len(texts), length), self.tokenizer.eos_token_id)
        may_mask = torch.ones(input_ids.shape, dtype=torch.bool)
        for row, (text, feature) in enumerate(zip(texts, features, strict=True)):
            input_ids[row, : len(text)] = text
            labels = torch.as_tensor(feature.get("labels", text))
            if len(labels) != len(text):
                raise ValueError(f"`labels` must be as long as `input_ids`, {len(text)}, got {len(labels)}.")
            may_mask[row, : len(text)] = labels != IGNORED
        return input_ids, may_mask
