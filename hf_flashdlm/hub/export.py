"""Repositories for the Hugging Face Hub: folders built from these very source files.

Owns what lies in a repository of each kind (weights with code, code alone, a guider, the strategy alone) and the
cards. Which source files belong together is for Transformers to say. Knows nothing of decoding and of uploads.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2
import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_lavida import LavidaConfig
from ..generate import generate
from ..generation_config import DiffusionOptions
from ..methods import METHODS
from ..processing_lavida import LavidaProcessor as ProcessorFromFiles
from ..processing_original import LavidaProcessor
from ..tiny import FOLDER
from ..tokenization_dream import DreamTokenizer
from ..version import __version__
from .loading import (
    MODELS,
    auto_class,
    bounded,
    is_diffusion_model,
    load_config,
    load_diffusion_config,
    load_processor,
    load_tokenizer,
    load_weights,
    refusing,
    sees_images,
    set_mask_token,
    shard_names,
    stored_sizes,
)


WITH_DEFAULTS = ("llada", "llada_moe", "llada2_moe", "Dream")  # those of a released checkpoint
STRATEGY = "custom_generate"  # the folder that Transformers looks for
REQUIREMENTS = (
    "torch>=2.6",
    "transformers>=5.18",
)  # one `name OPERATOR version` a line is all that Transformers reads
NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # what a checkpoint is fetched for
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")  # the same without the weights
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them makes a tokenizer

# huggingface_hub has changed its HTTP library before; its own error knows which one it is.
CONNECTION_ERRORS = tuple(kind for kind in HfHubHTTPError.__bases__ if kind is not OSError)


def export_model(checkpoint: str, directory: str | Path, repo_id: str, card: str | None = None) -> Path:
    r"""
    Write a repository with the weights of a diffusion model, as they are, and the code that decodes them.

    Args:
        checkpoint (`str`): Folder or Hub repository, with weights in safetensors and a tokenizer.
        directory (`str` or `Path`): A new or an empty folder.
        repo_id (`str`): The repository that the folder is going to be, for the card.
        card (`str`, *optional*): One of `model_cards/`; by default the checkpoint's own or that of its family.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the checkpoint is of another architecture or not complete, or if the folder is in use.
    """
    check_repo_id(repo_id)
    source = _fetch(checkpoint)
    config = _diffusion_config(source, checkpoint)
    weights = _whole_weights(source, checkpoint, config)
    tokenizer, processor = _text_and_images(source, checkpoint, config)
    model = _meta_model(config)
    generation_config = _generation_config(source, checkpoint, config)
    with new_directory(directory, source) as directory:
        for name in weights:
            shutil.copyfile(source / name, directory / name)
        _save_code(model, directory)
        model.config.save_pretrained(directory)
        generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if processor is not None:
            _save_processor(processor, directory)
        card = card or _card_of(checkpoint, config)
        method = getattr(config, "recommended_method", None)
        has_chat_template = tokenizer.chat_template is not None
        _save_card(directory, card, repo_id, checkpoint, has_chat_template=has_chat_template, method=method)
    return directory


def export_guider(checkpoint: str, directory: str | Path, repo_id: str, card: str = "guider") -> Path:
    """
    Write a repository with an autoregressive model of Transformers' own, which needs no code; arguments and errors
    as of [`export_model`].
    """
    check_repo_id(repo_id)
    source = _fetch(checkpoint)
    settings = {"config.json": _config_dict(source, checkpoint)}
    config = load_config("checkpoint", str(source))
    if is_diffusion_model(config):
        raise ValueError(f"`checkpoint` must be an autoregressive model, got the diffusion model {checkpoint!r}.")
    weights = _whole_weights(source, checkpoint, config)
    if (source / "generation_config.json").is_file():
        settings["generation_config.json"] = _read_json(source / "generation_config.json", checkpoint)
    tokenizer = _tokenizer(source, checkpoint)
    with new_directory(directory, source) as directory:
        for name in weights:
            shutil.copyfile(source / name, directory / name)
        for name, values in settings.items():
            values.pop("auto_map", None)  # code of the source
            (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(directory)
        _save_card(directory, card, repo_id, checkpoint)
    return directory


def export_code(model_type: str, directory: str | Path, repo_id: str, checkpoint: str | None = None) -> Path:
    r"""
    Write a repository with code alone, for checkpoints whose weights stay where they are.

    Args:
        model_type (`str`): That of a diffusion model; `"llada_moe"` for LLaDA-MoE, whose files say `"llada"`.
        directory (`str` or `Path`): A new or an empty folder.
        repo_id (`str`): The repository that the folder is going to be: its config points at its own code.
        checkpoint (`str`, *optional*): A checkpoint, for its configuration. By default that of LLaDA-8B, Dream-7B,
            LLaDA-MoE or LLaDA2.0-mini; other types have no default.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If there is no such architecture, or no configuration for it, or if the folder is in use.
    """
    check_repo_id(repo_id)
    if model_type not in MODELS:
        raise ValueError(f"`model_type` must be one of {', '.join(MODELS)}, got {model_type!r}.")
    if checkpoint is None and model_type not in WITH_DEFAULTS:
        needed = "the processor of images" if issubclass(MODELS[model_type], LavidaConfig) else "sizes"
        raise ValueError(
            f"`checkpoint` must be given for {model_type!r}, whose checkpoints do not share {needed}: name one of "
            "them."
        )
    processor = None
    if checkpoint is None:
        config = MODELS[model_type]()
    else:
        source = _fetch(checkpoint, SETTINGS)
        config = _diffusion_config(source, checkpoint)
        if sees_images(config) or any((source / name).is_file() for name in TOKENIZERS):
            _, processor = _text_and_images(source, checkpoint, config)
    found = next(name for name, kind in MODELS.items() if type(config) is kind)
    if found != model_type:
        raise ValueError(f"`checkpoint` must be of type {model_type!r}, got {found!r}.")
    with refusing("`checkpoint` must have a config.json that describes a model"), bounded():
        model = _meta_model(config)
    with new_directory(directory) as directory:
        _save_code(model, directory)
        model.config.auto_map = {name: f"{repo_id}--{value}" for name, value in model.config.auto_map.items()}
        model.config.save_pretrained(directory)
        if processor is not None:
            _save_processor(processor, directory)
        _save_card(directory, "code", repo_id, checkpoint, model_type=model_type)
    return directory


def export_strategy(directory: str | Path, repo_id: str) -> Path:
    """
    Write a repository with the strategy alone, for `custom_generate="<repo_id>"`; arguments and errors as of
    [`export_model`].
    """
    check_repo_id(repo_id)
    with new_directory(directory) as directory:
        (directory / STRATEGY).mkdir()
        custom_object_save(generate, directory / STRATEGY)
        (directory / STRATEGY / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
        _save_card(directory, "strategy", repo_id, None)
    return directory


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository."""
    try:
        validate_repo_id(repo_id)
        complete = "/" in repo_id
    except HFValidationError:
        complete = False
    if not complete:
        raise ValueError(f"`repo_id` must have the form organization/name, got {repo_id!r}.")


def _fetch(checkpoint: str, names: tuple[str, ...] = NEEDED) -> Path:
    """The folder of a checkpoint, downloaded if it is not one; all that a link in it leads to is inside."""
    with refusing(f"`checkpoint` must be a folder or a repository, got {checkpoint!r}"):
        is_folder = Path(checkpoint).is_dir()
    if is_folder:
        source = Path(checkpoint)
    else:
        try:
            source = Path(snapshot_download(checkpoint, allow_patterns=list(names)))
        except (HFValidationError, OSError, *CONNECTION_ERRORS) as error:
            raise ValueError(
                f"`checkpoint` must be a folder or a repository that can be downloaded, got {checkpoint!r} "
                f"({type(error).__name__})."
            ) from error
    check_links("checkpoint", source)
    return source


def check_links(option: str, folder: Path) -> None:
    """Refuse a folder with a link out of it; a snapshot in the Hub's cache has its content in the folder `blobs`."""
    root = Path(os.path.realpath(folder))
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
            raise ValueError(
                f"`{option}` must have no link that leads out of it, but in {str(folder)!r} "
                f"{path.relative_to(folder).as_posix()!r} does: put the file there, or remove the link."
            )


def _read_json(path: Path, checkpoint: str) -> dict:
    """A file of settings."""
    with refusing(f"`checkpoint` must have a {path.name} in JSON, but in {checkpoint!r}"):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"`checkpoint` must have an object in {path.name}, got {type(values).__name__}.")
    return values


def _config_dict(source: Path, checkpoint: str) -> dict:
    if not (source / "config.json").is_file():
        raise ValueError(f"`checkpoint` must have a config.json, which {checkpoint!r} has not.")
    return _read_json(source / "config.json", checkpoint)


def _diffusion_config(source: Path, checkpoint: str) -> PreTrainedConfig:
    """The configuration of a diffusion model, which must be there."""
    _config_dict(source, checkpoint)
    return load_diffusion_config("checkpoint", str(source))


def _meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without its weights."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def weight_files(source: Path, checkpoint: str) -> list[str]:
    """Names of the files of weights as Transformers chooses them, which must be there and be safetensors."""
    names = shards = [SAFE_WEIGHTS_NAME]
    index = source / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        with refusing(f"`checkpoint` must have an index of its weights that can be read, but in {checkpoint!r}"):
            indexed = shard_names(index)
        if not (source / SAFE_WEIGHTS_NAME).is_file():
            names, shards = [*indexed, SAFE_WEIGHTS_INDEX_NAME], indexed
    absent = [name for name in names if not (source / name).is_file()]
    if absent:
        raise ValueError(f"`checkpoint` must have its weights as safetensors, but {checkpoint!r} has no {absent[0]}.")
    for name in shards:
        with refusing(f"`checkpoint` must have its weights as safetensors, but in {checkpoint!r} {name} is none"):
            stored_sizes(source / name)
    return names


def _whole_weights(source: Path, checkpoint: str, config: PreTrainedConfig) -> list[str]:
    """Names of the files of weights, which hold all that the model needs, in its sizes."""
    if getattr(config, "transformers_weights", None) is not None:
        raise ValueError(
            f"`checkpoint` must have its weights in {SAFE_WEIGHTS_NAME} or shards of an index, but the config.json of "
            f"{checkpoint!r} names another file: remove `transformers_weights` there."
        )
    names = weight_files(source, checkpoint)
    load_weights("checkpoint", str(source), config)
    return names


def _generation_config(source: Path, checkpoint: str, config: PreTrainedConfig) -> GenerationConfig:
    """The checkpoint's, our options included, completed so that a pipeline adds nothing of its own."""
    path = source / "generation_config.json"
    values = _read_json(path, checkpoint) if path.is_file() else {}
    # Transformers would drop our options from a file with this mark.
    values.pop("_from_model_config", None)
    special = {name: getattr(config, name) for name in ("eos_token_id", "pad_token_id", "mask_token_id")}
    values = {"do_sample": False, "max_new_tokens": 128} | special | values
    with refusing(f"`checkpoint` must have a generation_config.json that can be used, but in {checkpoint!r}"):
        generation_config = GenerationConfig(**values)
        DiffusionOptions.read(generation_config)
    return generation_config


def _tokenizer(source: Path, checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer, set to pad as a batch of prompts needs it."""
    # Without its files Transformers would make up an empty one.
    if not any((source / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"`checkpoint` must have a tokenizer, which {checkpoint!r} has not.")
    # Dream's tokenizer is Qwen2's, whose name loads without this package and without remote code.
    with refusing(f"`checkpoint` must have a tokenizer of Transformers', which {checkpoint!r} has not"):
        named = str(get_tokenizer_config(source).get("tokenizer_class"))
    kind = Qwen2Tokenizer if named.startswith(DreamTokenizer.__name__) else AutoTokenizer
    tokenizer = load_tokenizer("checkpoint", str(source), kind)
    for name in ("auto_map", "is_local", "local_files_only"):  # of the source, and not to be saved
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _text_and_images(
    source: Path, checkpoint: str, config: PreTrainedConfig
) -> tuple[PreTrainedTokenizerBase, LavidaProcessor | None]:
    """The tokenizer, and the processor of a model that sees images; `config` learns their ids."""
    tokenizer = _tokenizer(source, checkpoint)
    set_mask_token("checkpoint", str(source), config, tokenizer)
    return tokenizer, load_processor("checkpoint", str(source), config, tokenizer) if sees_images(config) else None


@contextmanager
def new_directory(directory: str | Path, source: Path | None = None) -> Iterator[Path]:
    """A folder that is new or empty, outside of `source`; what fails inside the block leaves it as it was."""
    directory = Path(directory)
    if source is not None and Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(source)):
        raise ValueError(f"`directory` must not lie in the checkpoint, got {str(directory)!r}.")
    try:
        existed = directory.is_dir()
        in_use = any(directory.iterdir()) if existed else directory.exists()
        if not in_use:
            directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"`directory` must be a folder that can be written, got {str(directory)!r}.") from error
    if in_use:
        raise ValueError(f"`directory` must be new or empty, got {str(directory)!r}.")
    try:
        yield directory
    except BaseException:
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed:
            directory.rmdir()
        raise


def _save_code(model: PreTrainedModel, directory: Path) -> None:
    """Copy the source files of `model` and name its classes in `model.config`, by the means of Transformers."""
    config = model.config
    config.auto_map = {}
    kind = auto_class(config).__name__
    config.architectures = [kind]  # `transformers serve` looks them up in the library alone
    names = ["AutoModel", kind]
    if not config.logits_shift and not sees_images(config):  # scores each position in place
        names.append("AutoModelForMaskedLM")
    for name in names:
        model._auto_class = name
        custom_object_save(model, directory, config)
    config._auto_class = "AutoConfig"
    custom_object_save(config, directory, config)
    del config._auto_class  # or saving the config would write its part of `auto_map` once more


def _save_processor(processor: LavidaProcessor, directory: Path) -> None:
    """Save the files of a processor, and the source file of its class, without what makes one of a tokenizer."""
    processor.save_pretrained(directory)
    custom_object_save(ProcessorFromFiles, directory)
    module = ProcessorFromFiles.__module__.rpartition(".")[2]
    values = json.loads((directory / PROCESSOR_NAME).read_text(encoding="utf-8"))
    values["auto_map"] = {"AutoProcessor": f"{module}.{ProcessorFromFiles.__name__}"}
    (directory / PROCESSOR_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _cards() -> Path:
    """The folder of the cards: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "model_cards", package.parent / "model_cards") if path.is_dir())


def _card_of(checkpoint: str, config: PreTrainedConfig) -> str:
    """The card named like the checkpoint, or like the file of its model: its family's."""
    family = type(config).__module__.rpartition("configuration_")[2].replace("_", "-")
    names = (checkpoint.rstrip("/").rpartition("/")[2].lower(), family)
    return next((name for name in names if (_cards() / f"{name}.md").is_file()), "model")


def _save_card(directory: Path, card: str, repo_id: str, checkpoint: str | None, **values) -> None:
    """Fill in a card of `model_cards/` and write it as README.md."""
    folder = _cards()
    known = sorted(path.stem for path in folder.glob("[!_R]*.md"))
    if card not in known:
        raise ValueError(f"`card` must be one of {', '.join(known)}, got {card!r}.")
    values |= {
        "version": __version__,
        "repo_id": repo_id,
        "base_model": None if checkpoint is None or Path(checkpoint).is_dir() else checkpoint,
        "requirements": REQUIREMENTS,
        "methods": METHODS,
        "results": json.loads((FOLDER / "results.json").read_text(encoding="utf-8")),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    ModelCard(environment.get_template(f"{card}.md").render(values)).save(directory / "README.md")
