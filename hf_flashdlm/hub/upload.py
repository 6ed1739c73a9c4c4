"""The upload of an exported folder to the Hugging Face Hub.

Owns the order of an upload, what makes a folder fit for one, and the answers of the Hub in plain words. Knows
nothing of how the folder was written or of decoding.
"""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import PROCESSOR_NAME

from ..version import __version__
from .export import CONNECTION_ERRORS, STRATEGY, check_links, check_repo_id, weight_files
from .loading import refusing


IGNORED = (".*", "*/.*", "*__pycache__*", "*.pyc")  # what a folder is pushed without
PUBLISHED = (  # and the files of weights
    *("README.md", "LICENSE*", "NOTICE*", "*.png", "*.svg", "*.gif", "*.jpg"),
    *(
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "model.safetensors.index.json",
        "*.py",
        "custom_generate/requirements.txt",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "*.model", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
REFERENCE = re.compile(r"([\w.-]+/[\w.-]+--)?\w+\.\w+")  # a class in `auto_map`
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py")  # of an earlier version it might be loaded instead


def list_files(directory: str | Path) -> dict[str, int]:
    """
    What a push of `directory` would upload, if it is a complete repository and nothing else: names and sizes in bytes.
    """
    directory = Path(directory)
    check_links("directory", directory)
    weights = _check_exported(directory)
    names = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if not path.is_dir())
    names = list(filter_repo_objects(names, ignore_patterns=IGNORED))
    for name in names:
        published = any(fnmatch(name, pattern) for pattern in PUBLISHED) and (directory / name).is_file()
        if not published and name not in weights:
            raise ValueError(
                f"`directory` must hold nothing but a repository's files, got {name!r}: move it elsewhere."
            )
    return {name: (directory / name).stat().st_size for name in names}


def push(
    directory: str | Path,
    repo_id: str,
    private: bool | None = None,
    tag: str = __version__,
    token: str | None = None,
) -> str:
    r"""
    Publish an exported folder: create the repository if there is none, upload all files in one commit, tag it.

    Nothing of an upload shows before its commit, so one that was interrupted can be repeated; large files that the
    Hub holds already are not sent again. The commit removes weights and code that the folder has not, and leaves all
    else that the repository holds.

    Args:
        directory (`str` or `Path`): A folder that an export has written.
        repo_id (`str`): The repository, `"organization/name"`.
        private (`bool`, *optional*): Whether a new repository is private; by default what the account says. One that
            is there already must agree.
        tag (`str`, *optional*, defaults to the version of this package): Name for the commit.
        token (`str`, *optional*): By default the one of `hf auth login`.

    Returns:
        `str`: Where the files are.

    Raises:
        ValueError: If the folder is not complete, the token is missing or refused, the tag is taken, the repository
            is there and not as `private` says, or the upload did not end.
    """
    check_repo_id(repo_id)
    list_files(directory)
    token = token or get_token()
    if token is None:
        raise ValueError("a token is needed to push and there is none: run `hf auth login`, or set `HF_TOKEN`.")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private is not None and api.model_info(repo_id).private != private:
            raise ValueError(
                f"`private` must agree with {repo_id}, which is there already, got {private}: drop it, or change the "
                "settings of the repository."
            )
        if any(one.name == tag for one in api.list_repo_refs(repo_id).tags):
            raise ValueError(f"`tag` must be new, got {tag!r}, which {repo_id} has already: name another one.")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=f"hf_flashdlm {tag}",
            ignore_patterns=list(IGNORED),
            delete_patterns=list(REPLACED),
        )
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    except OfflineModeIsEnabled as error:
        raise ValueError("the Hub cannot be reached in offline mode: unset `HF_HUB_OFFLINE`.") from error
    except HfHubHTTPError as error:
        raise ValueError(_refusal(error, repo_id)) from error
    except (*CONNECTION_ERRORS, OSError, RuntimeError) as error:  # the last for a file that went up by itself
        raise ValueError(
            f"the upload to {repo_id} broke off ({type(error.__cause__ or error).__name__}): run the same command "
            "again, which goes on from there."
        ) from error
    return f"{api.endpoint}/{repo_id}/tree/{tag}"


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    """One sentence for an answer of the Hub that is not what was asked for, its own words included."""
    status = error.response.status_code
    said = f"{status} {' '.join((error.server_message or '').split())}".strip()
    if status in (401, 403):
        return f"the Hub refused the token for {repo_id} ({said}): run `hf auth login` with one that may write there."
    return f"the Hub refused the push to {repo_id} ({said}): nothing was tagged; run it again when that is remedied."


def _check_exported(directory: Path) -> list[str]:
    """Refuse to publish a folder that would not load; the names of its files of weights."""

    def need(name: str) -> Path:
        if not (directory / name).is_file():
            raise ValueError(f"`directory` must be a complete repository, but {str(directory)!r} has no {name}.")
        return directory / name

    need("README.md")
    modules, weights = [], []
    if (directory / STRATEGY).is_dir() and not (directory / "config.json").is_file():
        modules.append(need(f"{STRATEGY}/generate.py"))
        need(f"{STRATEGY}/requirements.txt")
    else:
        references = _code_references(need("config.json"))
        if (directory / PROCESSOR_NAME).is_file():
            references += _code_references(directory / PROCESSOR_NAME)
        modules += [need(value.rpartition("--")[2].partition(".")[0] + ".py") for value in references]
        if not any("--" in value for value in references):
            weights = weight_files(directory, str(directory))
            need("tokenizer_config.json")
    for module in modules:
        try:
            with refusing(f"`directory` must hold code that can be read, but {module.name} is not"):
                get_relative_import_files(module)
        except ValueError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            need(Path(error.__cause__.filename).relative_to(directory).as_posix())
    return weights


def _code_references(path: Path) -> list[str]:
    """The classes that a file of settings names: module and class, after the repository if it is another."""
    with refusing(f"`directory` must have a {path.name} in JSON, but in {str(path.parent)!r}"):
        config = json.loads(path.read_text(encoding="utf-8"))
    auto_map = config.get("auto_map") if isinstance(config, dict) else config
    values = auto_map.values() if isinstance(auto_map, dict) else [] if auto_map is None else [auto_map]
    references = [
        one for value in values for one in (value if isinstance(value, list) else [value]) if one is not None
    ]
    for one in references:
        if not isinstance(config, dict) or not isinstance(one, str) or not REFERENCE.fullmatch(one):
            raise ValueError(f"`directory` must have a {path.name} that names classes in auto_map, got {one!r}.")
    return references
