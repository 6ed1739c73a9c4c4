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
        vision_aspect_ratio (`str`, *optional*, defaults to `"anyres_max_9"`):
            How many tiles have as many tokens as a larger grid is scaled down to.
    """

    def __init__(  # noqa: PLR0913, the arguments of Transformers
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int = 196,
        vision_feature_select_strategy: str = "full",
        chat_template: str | None = None,
        image_token: str = "<image>",
        vision_aspect_ratio: str = "anyres_max_9",
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )

    def __call__(self, images=None, text=None, **kwargs):
        """
        See [`~transformers.ProcessorMixin`]. Images in one list go to the texts in order, as many as each asks for.

        Raises:
            ValueError: If an image cannot be read, or if a text does not ask for as many images as it has.
        """
        if images is not None:
            images = self._read(images)
        if text is not None:
            images = self._by_text([] if images is None else images, [text] if isinstance(text, str) else text)
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

    def _by_text(self, images, texts: list[str]):
        """A list of images for each text, or None if there are none."""
        asked = [text.count(self.image_token) for text in texts]
        images = list(images) if isinstance(images, list | tuple) else [images]
        if not any(isinstance(one, list | tuple) for one in images):
            left, given = iter(images), [len(images)]
            if len(images) == sum(asked):
                images, given = [[next(left) for _ in range(count)] for count in asked], asked
        else:
            given = [len(flat(of_text)) for of_text in images]
        if given != asked:
            raise ValueError(
                f"`text` must hold `{self.image_token}` once for each of its images, got {asked} in the texts and "
                f"{given} images."
            )
        return images if any(asked) else None


def flat(images) -> list:
    """The images in lists of lists."""
    return sum(map(flat, images), []) if isinstance(images, list | tuple) else [images]


__all__ = ["LavidaProcessor"]
