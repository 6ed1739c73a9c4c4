"""The processor of LaViDa as a repository of the Hub holds it: chats with pictures become prompts.

Owns how pictures are read and which of them belong to which text. Knows nothing of models, or of how a checkpoint
without files of a processor gets one.
"""

from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor


class LavidaProcessor(LlavaOnevisionProcessor):
    r"""
    [`~transformers.LlavaOnevisionProcessor`] without videos, which needs no torchvision. An image by itself is cut
    into tiles; several of a prompt are one tile each, padded to a square.

    Args:
        image_processor (`LlavaOnevisionImageProcessorPil`, *optional*): Makes tiles of images.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Knows `image_token`.
        num_image_tokens (`int`, *optional*, defaults to 196): Number of tokens of a tile.
        chat_template (`str`, *optional*): Renders chats whose contents are texts and images.
        image_token (`str`, *optional*, defaults to `"<image>"`): Stands for an image in a text.
    """

    def __init__(  # noqa: PLR0913, the arguments of Transformers
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int = 196,
        vision_feature_select_strategy: str = "full",
        chat_template: str | None = None,
        image_token: str = "<image>",
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            **kwargs,
        )

    def __call__(self, images=None, text=None, **kwargs):
        """
        See [`~transformers.ProcessorMixin`]. Images in one list go to the texts in order, as many as each asks for.

        Raises:
            ValueError: If an image cannot be read.
        """
        images = None if images is None else self._by_text(self._read(images), text)
        return super().__call__(images=images, text=text, **kwargs)

    def _read(self, images):
        """The pictures, read to their last byte: which error a broken file raises depends on how it is broken."""
        try:
            images = self.image_processor.fetch_images(images)
            for image in flat(images):
                if hasattr(image, "load"):
                    image.load()
        except Exception as error:
            raise ValueError(f"`images` must be pictures that can be read, got one that cannot: {error}") from error
        return images

    def _by_text(self, images, text):
        """Images as a list for each text, if they are one list that holds as many as the texts ask for."""
        if (
            text is None
            or not isinstance(images, list | tuple)
            or any(isinstance(one, list | tuple) for one in images)
        ):
            return images
        counts = [one.count(self.image_token) for one in ([text] if isinstance(text, str) else text)]
        left = iter(images)
        return [[next(left) for _ in range(count)] for count in counts] if sum(counts) == len(images) else images


def flat(images) -> list:
    """The images in lists of lists."""
    return sum(map(flat, images), []) if isinstance(images, list | tuple) else [images]


__all__ = ["LavidaProcessor"]
