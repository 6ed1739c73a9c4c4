"""The processor of LaViDa: chats with pictures become prompts.

Owns how the original checkpoints, which have no files of a processor, get one: tiles, the image token, and the system
message of the chat template. Knows nothing of models.
"""

from math import ceil

from transformers import AddedToken, AutoConfig, AutoTokenizer, LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.utils import PROCESSOR_NAME, cached_file


SYSTEM_MESSAGE = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# Before the template of the tokenizer: contents become text with image tokens, and a system message comes first.
FLATTEN = """
{%- set vision = namespace(messages=[], content='') -%}
{%- if messages and messages[0].role != 'system' -%}
{%- set vision.messages = [{'role': 'system', 'content': SYSTEM_MESSAGE}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- set vision.content = '' -%}
{%- if message.content is string -%}
{%- set vision.content = message.content -%}
{%- else -%}
{%- for part in message.content -%}
{%- set vision.content = vision.content + (IMAGE_TOKEN + '\n' if part.type == 'image' else part.text) -%}
{%- endfor -%}
{%- endif -%}
{%- set vision.messages = vision.messages + [{'role': message.role, 'content': vision.content}] -%}
{%- endfor -%}
{%- set messages = vision.messages -%}
"""
CACHED = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


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
        try:
            return super().__call__(images=self._by_text(images, text), text=text, **kwargs)
        except Exception as error:
            from PIL import Image  # which is needed for images alone

            if not isinstance(error, OSError | Image.DecompressionBombError):
                raise
            raise ValueError(f"`images` must be pictures that can be read, got one that cannot: {error}") from error

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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[override]  # handed on
        """[`~transformers.ProcessorMixin.from_pretrained`], which makes a processor where there is none."""
        known = {name: value for name, value in kwargs.items() if name in CACHED}
        missing = {"_raise_exceptions_for_missing_entries": False}
        if cached_file(pretrained_model_name_or_path, PROCESSOR_NAME, **known, **missing) is not None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **known)
        return cls.of(config, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **known))

    @classmethod
    def of(cls, config, tokenizer) -> "LavidaProcessor":
        r"""
        The processor of a checkpoint.

        Args:
            config ([`LavidaConfig`]): Its configuration.
            tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, which learns the image token.

        Raises:
            ValueError: If `config.image_token_id` cannot be the image token of the tokenizer.
        """
        size = config.vision_config.image_size
        image_processor = LlavaOnevisionImageProcessorPil(
            size={"height": size, "width": size},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            image_grid_pinpoints=[[height, width] for width, height in config.image_grid_pinpoints],
        )
        image_token = _image_token(config.image_token_id, tokenizer)
        tokenizer.padding_side = "left"
        template = tokenizer.chat_template
        if template is not None:
            texts = {"SYSTEM_MESSAGE": SYSTEM_MESSAGE, "IMAGE_TOKEN": image_token}
            template = "".join(f"{{%- set {name} = {text!r} -%}}" for name, text in texts.items()) + FLATTEN + template
        side = ceil(size // config.vision_config.patch_size / 2)
        return cls(image_processor, tokenizer, side**2, chat_template=template, image_token=image_token)


def _image_token(token_id: int | None, tokenizer) -> str:
    """The token that stands for an image: the one with that id, or a new one."""
    token = "<image>"
    known = None if token_id is None or token_id >= len(tokenizer) else tokenizer.convert_ids_to_tokens(token_id)
    if token not in tokenizer.get_vocab():
        if known is not None:
            return known
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)
    got = tokenizer.convert_tokens_to_ids(token)
    if token_id not in (None, got):
        raise ValueError(
            f"`image_token_id` must be the id of `{token}` in the tokenizer, {got}, got {token_id}: set it in the "
            "configuration of the model."
        )
    return token


__all__ = ["LavidaProcessor"]
