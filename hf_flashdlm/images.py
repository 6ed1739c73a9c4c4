"""Images in a prompt.

Owns where the embeddings of images stand on a canvas, and how a forward is given them. Knows nothing of how they are
computed, or of steps, blocks and caches.

Shapes: B batch, P prompt length, T positions fed to a forward, D width of the embeddings.
"""

import torch
from torch.nn.functional import pad


class Images:
    r"""
    The embeddings of images, at the positions that image tokens hold in the prompts. Where images stand is decided
    once, from the prompts: a model may well write the image token.

    Args:
        embeds (`torch.Tensor` of shape `(batch_size, prompt_length, hidden_size)`): Zero where there is no image.
        is_image (`torch.BoolTensor` of shape `(batch_size, prompt_length)`): Where images stand.
    """

    def __init__(self, embeds: torch.Tensor, is_image: torch.Tensor):
        self.embeds, self.is_image = embeds, is_image
        columns = torch.arange(1, is_image.shape[1] + 1, device=is_image.device)
        self.ends = (is_image * columns).amax(1).tolist()  # after each row's last image

    @classmethod
    def of(cls, features: list[torch.Tensor], input_ids: torch.Tensor, is_image: torch.Tensor) -> "Images":
        r"""
        Args:
            features (`list[torch.Tensor]`): Embeddings `(num_tokens, hidden_size)` of each image, row after row.
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): The prompts.
            is_image (`torch.BoolTensor` of the same shape): Where they hold image tokens.

        Raises:
            ValueError: If there are more or fewer image tokens than embeddings.
        """
        embeddings = torch.cat(features).to(input_ids.device)
        if int(is_image.sum()) != len(embeddings):
            raise ValueError(
                f"`input_ids` must hold an image token for each of the {len(embeddings)} embeddings of the images, "
                f"got {int(is_image.sum())}: prepare the prompts with the processor of the model."
            )
        embeds = embeddings.new_zeros(*input_ids.shape, embeddings.shape[-1])
        embeds[is_image] = embeddings
        return cls(embeds, is_image)

    def are_fed(self, lows: list[int]) -> bool:
        """Whether a forward whose rows begin at the positions `lows` reaches an image."""
        return any(low < end for low, end in zip(lows, self.ends, strict=True))

    def embed(self, model, input_ids: torch.Tensor, feed: slice | torch.Tensor) -> torch.Tensor:
        r"""
        The embeddings of what is fed.

        Args:
            model (`PreTrainedModel`): Embeds the tokens.
            input_ids (`torch.LongTensor` of shape `(batch_size, T)`): The tokens that are fed.
            feed (`slice` or `torch.LongTensor` of shape `(batch_size, T)`): Their columns.

        Returns:
            `torch.Tensor` of shape `(batch_size, T, hidden_size)`.
        """
        embeds = model.get_input_embeddings()(input_ids)
        if isinstance(feed, slice):
            feed = torch.arange(feed.start, feed.stop, device=input_ids.device).expand(len(input_ids), -1)
        length = self.is_image.shape[1]
        columns = feed.clamp_max(length - 1)
        is_image = self.is_image.gather(1, columns) & (feed < length)
        images = self.embeds.gather(1, columns[..., None].expand(-1, -1, self.embeds.shape[-1]))
        return torch.where(is_image[..., None], images.to(embeds.dtype), embeds)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        rows = indices.to(self.embeds.device)
        self.embeds, self.is_image = self.embeds[rows], self.is_image[rows]
        self.ends = [self.ends[index] for index in indices.tolist()]

    def with_rows_without(self) -> "Images":
        """The same rows and as many without images, for guidance."""
        rows = (0, 0) * (self.embeds.ndim - 1) + (0, len(self.embeds))
        return Images(pad(self.embeds, rows), pad(self.is_image, (0, 0, 0, len(self.is_image))))
