"""A processor for the original checkpoints of LaViDa, which have no files of one.

Owns what it is made of: tiles, the image token, and the system message of the chat template. Knows nothing of models.
"""

from transformers import AddedToken, AutoConfig, AutoTokenizer, LlavaOnevisionImageProcessorPil
from transformers.utils import PROCESSOR_NAME, cached_file

from .processing_lavida import LavidaProcessor as ProcessorFromFiles


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
MOST_TILES = 10**6  # as good as no limit
CACHED = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class LavidaProcessor(ProcessorFromFiles):
    """
    The processor of LaViDa, made of a tokenizer and a configuration where there are no files of it; has the name of
    [`ProcessorFromFiles`], which reads what this class saves.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[override]  # handed on
        """
        [`~transformers.ProcessorMixin.from_pretrained`], which makes a processor where there is none.

        Raises:
            ValueError: If there is one of another family, or what [`LavidaProcessor.of`] raises.
        """
        known = {name: value for name, value in kwargs.items() if name in CACHED}
        missing = {"_raise_exceptions_for_missing_entries": False}
        if cached_file(pretrained_model_name_or_path, PROCESSOR_NAME, **known, **missing) is not None:
            values, _ = cls.get_processor_dict(pretrained_model_name_or_path, **known)
            kind = values.get("processor_class")
            if kind != cls.__name__:
                raise ValueError(
                    f"`processor_class` must be {cls.__name__} in {PROCESSOR_NAME} of a LaViDa, got {kind!r}: remove "
                    "the file, and a processor is made of the tokenizer."
                )
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
            ValueError: If `config.image_token_id` cannot be the image token of the tokenizer, or if the model has no
                embedding for it.
        """
        size = config.vision_config.image_size
        image_processor = LlavaOnevisionImageProcessorPil(
            size={"height": size, "width": size},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            image_grid_pinpoints=[[height, width] for width, height in config.image_grid_pinpoints],
        )
        image_token = _image_token(config, tokenizer)
        tokenizer.padding_side = "left"
        template = tokenizer.chat_template
        if template is not None:
            texts = {"SYSTEM_MESSAGE": SYSTEM_MESSAGE, "IMAGE_TOKEN": image_token}
            template = "".join(f"{{%- set {name} = {text!r} -%}}" for name, text in texts.items()) + FLATTEN + template
        return cls(
            image_processor,
            tokenizer,
            config.tile_side**2,
            chat_template=template,
            image_token=image_token,
            vision_aspect_ratio=f"anyres_max_{config.max_tiles or MOST_TILES}",
        )


def _image_token(config, tokenizer) -> str:
    """The token that stands for an image: that of the configuration, or a new one."""
    token, token_id = "<image>", config.image_token_id
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
    size = getattr(config, "embedding_size", None) or config.vocab_size
    if got >= size:
        raise ValueError(
            f"`tokenizer` must leave an id below {size} for `{token}`, got {len(tokenizer) - 1} tokens: name one of "
            "them in `image_token_id` of the configuration."
        )
    return token


__all__ = ["LavidaProcessor"]
