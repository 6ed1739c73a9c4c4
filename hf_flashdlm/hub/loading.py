"""Reading a checkpoint that nobody vouches for: its configuration, its weights, its tokenizer.

Owns what makes a checkpoint whole, how much of the machine it may take before that is known, and that every fault of
it is a `ValueError` of one sentence. `option` in an argument list is what the sentence calls the checkpoint. Runs no
code of a repository and reads weights from safetensors alone. Knows nothing of prompts, of exports or of decoding.
"""

import json
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..configuration_a2d import A2DLlamaConfig, A2DQwen2Config, A2DQwen3Config
from ..configuration_diffusion import repository_name
from ..configuration_dream import DreamConfig
from ..configuration_fast_dllm_v2 import Fast_dLLM_QwenConfig
from ..configuration_lavida import LavidaConfig, LavidaDreamConfig, LavidaLLaDAConfig, LLaDAVConfig
from ..configuration_llada import LLaDAConfig
from ..configuration_llada2 import LLaDA2MoeConfig
from ..configuration_llada_moe import LLaDAMoEConfig
from ..configuration_mmada import MMadaConfig
from ..configuration_open_dcoder import OpenDCoderConfig
from ..configuration_sdar import SDARConfig, SDARMoeConfig
from ..processing_original import LavidaProcessor


try:
    import resource
except ImportError:  # on Windows, where nothing bounds what a template or a configuration takes
    resource = None

SECONDS, BYTES = 20, 2**31  # of processor time, and of memory beyond what the process has

# The diffusion models, by `model_type`; LLaDA-MoE and LLaDA-V, which have that of LLaDA and of LaViDa, by names of
# their own.
MODELS: dict[str, type[PreTrainedConfig]] = {
    "llada": LLaDAConfig,
    "llada_moe": LLaDAMoEConfig,
    "llada2_moe": LLaDA2MoeConfig,
    "mmada": MMadaConfig,
    "Dream": DreamConfig,
    "open_dcoder": OpenDCoderConfig,
    "sdar": SDARConfig,
    "sdar_moe": SDARMoeConfig,
    "Fast_dLLM_Qwen": Fast_dLLM_QwenConfig,
    "a2d-qwen3": A2DQwen3Config,
    "a2d-qwen2": A2DQwen2Config,
    "a2d-llama": A2DLlamaConfig,
    "llava_llada": LavidaLLaDAConfig,
    "llava_dream": LavidaDreamConfig,
    "llada_v": LLaDAVConfig,
}

# What of a processor has to fit the model.
PROCESSED = ("image_token_id", "num_image_tokens", "vision_aspect_ratio", "size", "image_grid_pinpoints")


class LimitReached(RuntimeError):
    """What a file of a checkpoint asks for takes too long."""


@contextmanager
def bounded(seconds: float | None = None, memory: int = BYTES) -> Iterator[None]:
    """
    Raise [`LimitReached`] after `seconds` of processor time (by default `SECONDS`), `MemoryError` beyond `memory` more
    bytes.
    """
    seconds = SECONDS if seconds is None else seconds
    with ExitStack() as stack:
        if resource is not None and Path("/proc/self/statm").is_file():
            before = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + memory
            if before[1] == resource.RLIM_INFINITY or most <= before[1]:
                resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
                stack.callback(resource.setrlimit, resource.RLIMIT_AS, before)
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():

            def out_of_time(*_):
                raise LimitReached(f"it takes more than {seconds} seconds.")

            handler = signal.signal(signal.SIGPROF, out_of_time)
            stack.callback(signal.signal, signal.SIGPROF, handler)
            stack.callback(signal.setitimer, signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again and again, as Jinja swallows errors of constants
        yield


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """
    Turn whatever a library raises at a file into a `ValueError`: `sentence` and what is wrong. Which errors libraries
    raise depends on how the file is broken, so this catches all.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{sentence}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What a library says first, with the name of an error that says nothing; later lines are about its arguments."""
    if isinstance(error, MemoryError):
        return "it takes too much memory."
    if isinstance(error, RecursionError):
        return "it never ends."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (LookupError, AttributeError, TypeError, ZeroDivisionError)) or not lines:
        lines = [" ".join([type(error).__name__, *lines[:1]])]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])


def load_config(option: str, name: str) -> PreTrainedConfig:
    """A configuration; see the module for `option`."""
    place = f"`{option}` must be a folder with a checkpoint or a Hub repository, got"
    with refusing(f"{place} {name!r}"):
        is_folder = Path(name).is_dir()
    if not is_folder and name.startswith(("/", ".", "~")):
        raise ValueError(f"{place} no folder {name!r}.")
    if is_folder:
        check_regular(option, Path(name))
    with refusing(f"{place} {name!r}"), bounded():
        model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`{option}` must have a `model_type` that Transformers or hf_flashdlm knows, got {model_type!r} in "
            f"{name!r}: load the model with its own code, and pass it to `diffusion_generate`."
        )
    with refusing(f"{place} {name!r}"), bounded():
        # The file of Open-dCoder is that of a Qwen2, and its name alone says what it is.
        is_open_dcoder = model_type == "qwen2" and "open-dcoder" in repository_name(name).lower()
        kind = OpenDCoderConfig if is_open_dcoder else AutoConfig
        config = kind.from_pretrained(name, trust_remote_code=False)
        kernel = config._attn_implementation
    if kernel is not None and "/" in str(kernel):
        raise ValueError(
            f"`{option}` must name no attention of another repository, which is code, got {kernel!r} in {name!r}: "
            "remove it from config.json."
        )
    return config


def load_diffusion_config(option: str, name: str) -> PreTrainedConfig:
    """The configuration of a diffusion model; see the module for `option`."""
    config = load_config(option, name)
    if not is_diffusion_model(config):
        raise ValueError(
            f"`{option}` must be a diffusion model, got {name!r} with `model_type` {config.model_type!r}: there are "
            f"{', '.join(MODELS)}."
        )
    return config


def is_diffusion_model(config: PreTrainedConfig) -> bool:
    """Whether the package has a model for it."""
    return type(config) in MODELS.values()


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether the package has a model for it that takes images."""
    return isinstance(config, LavidaConfig)


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class that makes a language model of it."""
    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def set_mask_token(option: str, name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the mask token from the tokenizer where `config.json` names none; refuse a checkpoint without one."""
    stated = PreTrainedConfig.get_config_dict(name)[0].get("mask_token_id")
    token_id = tokenizer.mask_token_id if stated is None else stated
    config.mask_token_id = config.mask_token_id if token_id is None else token_id
    if config.mask_token_id is None or not 0 <= config.mask_token_id < config.vocab_size:
        raise ValueError(
            f"`{option}` must name a mask token of its vocabulary of {config.vocab_size}, but {name!r} names "
            f"{config.mask_token_id}: put `mask_token_id` into its config.json."
        )


def check_regular(option: str, folder: Path) -> None:
    """Refuse a folder with a pipe, a device or the like, from which reading may never end."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"`{option}` must hold files and folders, got {path.name!r} in {str(folder)!r}.")


def load_weights(
    option: str, name: str, config: PreTrainedConfig, device_map: str | None = "meta", dtype: str = "auto"
) -> PreTrainedModel:
    r"""
    A model with all its weights.

    Args:
        option (`str`): See the module.
        name (`str`): Folder or Hub repository.
        config (`PreTrainedConfig`): What [`load_config`] gave.
        device_map (`str`, *optional*, defaults to `"meta"`): As of `from_pretrained`; the default reads everything and
            keeps nothing.
        dtype (`str`, *optional*, defaults to `"auto"`): As of `from_pretrained`.

    Raises:
        ValueError: If weights are missing, of other sizes, or of more layers than the configuration counts.
    """
    sentence = f"`{option}` could not be loaded from {name!r}"
    with refusing(sentence):
        files = safetensors_files(name)
        stored = {key: size for file in files for key, size in stored_sizes(file).items()}
    check_size(option, name, config, stored)
    with refusing(sentence):
        model, found = auto_class(config).from_pretrained(
            name,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_complete(option, name, model, found)
    return model.eval()


def safetensors_files(name: str) -> list[str]:
    """Paths of the files of weights, which Transformers downloads if need be."""
    single = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [single]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise OSError(f"it has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}.")
    return [cached_file(name, shard) for shard in shard_names(Path(index))]


def shard_names(index: Path) -> list[str]:
    """Names of the files in an index of weights, which lie beside it."""
    weight_map = json.loads(index.read_text(encoding="utf-8"))
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name} has no weight_map.")
    names = set(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {name!r}, which is no safetensors file beside it.")
    return sorted(names)


def stored_sizes(file: str | Path) -> dict[str, tuple[int, int]]:
    """Elements and bits per element of each tensor in a safetensors file, of which only the header is read."""
    bits = re.compile(r"\d+")
    sizes = {}
    with safe_open(file, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118, it is no dict
            tensor = weights.get_slice(key)
            width = bits.search(tensor.get_dtype())
            sizes[key] = (torch.Size(tensor.get_shape()).numel(), int(width[0]) if width else 8)
    return sizes


def check_size(option: str, name: str, config: PreTrainedConfig, stored: dict[str, tuple[int, int]]) -> None:
    """Refuse a configuration of more than the weights hold, before memory is taken for it."""
    place = f"`{option}` must have a config.json that fits its weights, but in {name!r}"
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(stored):
        raise ValueError(f"{place} it counts {layers} layers, and there are {len(stored)} tensors.")
    with refusing(place), bounded(), warnings.catch_warnings(action="ignore"), torch.device("meta"):
        count = sum(weight.numel() for weight in auto_class(config).from_config(config).parameters())
    held = sum(number for number, _ in stored.values())
    if getattr(config, "quantization_config", None) is not None:  # several weights in an element
        held = sum(number * width for number, width in stored.values())
    if count > 2 * held + 10**6:  # fewer are loaded, and named where they are missing
        raise ValueError(f"{place} it describes {count} weights, and there are {held}.")


def check_complete(option: str, name: str, model: PreTrainedModel, found: dict) -> None:
    """Refuse a model that has not all its weights from the checkpoint, or not all layers of the checkpoint."""
    kind = type(model).__name__
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(
            f"`{option}` must have all weights of {kind}, but {name!r} lacks {len(missing)} of them, {missing[0]} "
            "first."
        )
    if found["mismatched_keys"]:
        key, *sizes = min(found["mismatched_keys"])
        sizes = " and ".join(str(tuple(size)) for size in sizes)
        raise ValueError(
            f"`{option}` must have a config.json that fits its weights, but in {name!r} {key} has the sizes {sizes}."
        )
    known = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    extra = sorted(key for key in found["unexpected_keys"] if re.sub(r"\d+", "#", key) in known)
    if extra:
        raise ValueError(
            f"`{option}` must have a config.json that counts all layers of its weights, but {name!r} has {len(extra)} "
            f"weights more, {extra[0]} first."
        )


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or cannot reach here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` must be auto or a device that torch can use here, got {device!r}.") from error


def load_tokenizer(option: str, name: str, kind=AutoTokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer that pads on the left, as a batch of prompts needs it."""
    with refusing(f"`{option}` must have a tokenizer, got {name!r}"):
        for setting, value in get_tokenizer_config(name).items():
            if setting.endswith("_file") and value is not None and Path(value).name != value:
                raise ValueError(f"its `{setting}` is {value!r}, which lies elsewhere.")
        tokenizer = kind.from_pretrained(name, padding_side="left", trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # Transformers makes an empty one where the files are missing
        raise ValueError(f"`{option}` must have a tokenizer, got {name!r}: it has no vocabulary.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(
    option: str, name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> LavidaProcessor:
    """
    The processor of a model that sees images, around its tokenizer, which learns the image token and the processor's
    chat template; `config` learns the id of that token.
    """
    with refusing(f"`{option}` must have a processor that fits its model, but in {name!r}"):
        processor = LavidaProcessor.of(config, tokenizer)
        if cached_file(name, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False) is not None:
            made, processor = processor, LavidaProcessor.from_pretrained(name, trust_remote_code=False)
            processor.tokenizer = tokenizer
            for field, found, needed in zip(PROCESSED, *map(how_processed, (processor, made)), strict=True):
                if found != needed:
                    raise ValueError(f"`{field}` is {found!r}, and {needed!r} fits.")
    tokenizer.chat_template = processor.chat_template
    config.image_token_id = processor.image_token_id
    return processor


def how_processed(processor: LavidaProcessor) -> tuple:
    """Values of `PROCESSED`."""
    images = processor.image_processor
    counts = (processor.image_token_id, processor.num_image_tokens, processor.vision_aspect_ratio)
    return (*counts, dict(images.size), images.image_grid_pinpoints)
