"""The layout: which module may import which, and what exported modules must not do."""

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import hf_flashdlm


PACKAGE = Path(hf_flashdlm.__file__).parent
# By path in the package: "cache", "bench/demo", "hub/__init__".
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
ENTRIES = ("generate", "processing_lavida", *(name for name in MODULES if name.startswith("modeling_")))

# A file beside `__init__.py` ships to the Hub, but for these, which only the installed package needs.
PACKAGE_ONLY = {
    "__init__",
    "__main__",
    "data_collator",
    "log_likelihood",
    "processing_original",
    "prompting",
    "tokenization_dream",
    "unsupported",
    "version",
}

# The library, from the bottom to the top: a file imports from layers below its own.
LAYERS = (
    "cache canvas_processors compiling configuration_dream diffusion_loss generation_output guider_gate images "
    "methods processing_lavida schedule streaming synchronizing tokenization_dream unmasking unsupported version "
    "windows",
    "blocks configuration_diffusion data_collator fused_layers generation_config processing_original stopping",
    "block_causal configuration_a2d configuration_fast_dllm_v2 configuration_llada2 configuration_llada_moe "
    "configuration_open_dcoder configuration_sdar guider_reader",
    "configuration_llada denoiser denoising_loop generation_inputs guider_text",
    "configuration_lavida configuration_mmada guider log_likelihood parts",
    "generation_mixin",
    "generate modeling_diffusion modeling_dream modeling_llada",
    "modeling_a2d modeling_fast_dllm_v2 modeling_lavida modeling_llada2 modeling_llada_moe modeling_mmada "
    "modeling_open_dcoder modeling_sdar",
    "__init__ prompting",
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names.split()}

# The folders, which never ship, and the folders that each may import. All may import the library.
FOLDERS = {
    "app": {"console", "tiny"},
    "bench": {"console", "tiny"},
    "cli": {"app", "bench", "console", "evaluation", "hub", "tiny"},
    "console": {"hub"},
    "evaluation": {"bench", "console", "hub", "tiny"},
    "hub": {"tiny"},
    "tiny": set(),
}
REACHES_UP = {
    "__init__": {"console/display"},
    "__main__": {"cli/__init__"},
    "prompting": {"console/checkpoint"},
}
# What a folder gives to users by its own name. An import in the others would cause a cycle through `CanvasStreamer`.
FACADES = {
    "cli": ["main"],
    "hub": ["export_code", "export_guider", "export_model", "export_space", "export_strategy", "push"],
}


def exported():
    """The files that Transformers finds when it follows the relative imports of the entries."""
    files = {str(MODULES[name]) for name in ENTRIES}
    for name in ENTRIES:
        files.update(get_relative_import_files(MODULES[name]))
    return sorted(Path(file).relative_to(PACKAGE).with_suffix("").as_posix() for file in files)


EXPORTED = exported()
LIBRARY = sorted(name for name in MODULES if "/" not in name)
TOOLS = sorted(name for name in MODULES if "/" in name)


def nodes(name):
    return list(ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))))


def imports(name):
    """Modules of the package that `name` imports."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*name.split("/")[: -node.level], *(node.module or "").split(".")]
            target = "/".join(filter(None, parts))
            inner = ["/".join(filter(None, (target, alias.name))) for alias in node.names]
            package = "/".join(filter(None, (target, "__init__")))
            found.update([target] if target in MODULES else [path if path in MODULES else package for path in inner])
    return found


def folder(name):
    return name.rpartition("/")[0]


def packages(name):
    """Everything else that the module `name` imports."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", LEVELS)
def test_imports_point_down(name):
    known = imports(name) - REACHES_UP.get(name, set())
    above = {module for module in known if LEVELS.get(module, len(LAYERS)) >= LEVELS[name]}
    assert not above, f"{name} imports {above}, which is above or beside it"


def test_a_file_beside_init_ships_and_a_file_in_a_folder_never_does():
    assert set(EXPORTED) == set(LIBRARY) - PACKAGE_ONLY
    assert set(LIBRARY) == set(LEVELS) | {"__main__"}, "every file of the library has a layer"


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_knows_no_folder(name):
    assert {module for module in imports(name) if folder(module)} == REACHES_UP.get(name, set())


@pytest.mark.parametrize("name", TOOLS)
def test_arrows_between_folders(name):
    assert {folder(module) for module in imports(name)} <= FOLDERS[folder(name)] | {folder(name), ""}


@pytest.mark.parametrize("name", sorted(FOLDERS.keys() - {"tiny"} - FACADES.keys()))
def test_a_folder_of_tools_has_an_init_of_one_docstring(name):
    statements = ast.parse(MODULES[f"{name}/__init__"].read_text(encoding="utf-8")).body
    assert len(statements) == 1


@pytest.mark.parametrize("name", FACADES)
def test_what_users_import_from_a_folder_is_not_hidden_by_a_module(name):
    given = importlib.import_module(f"hf_flashdlm.{name}")
    assert given.__all__ == FACADES[name]
    assert all(callable(getattr(given, each)) and f"{name}/{each}" not in MODULES for each in given.__all__)


def test_there_is_no_circle():
    assert list(TopologicalSorter({name: imports(name) for name in MODULES}).static_order())


@pytest.mark.parametrize("name", MODULES)
def test_a_module_names_the_package_by_dots_alone(name):
    assert "hf_flashdlm" not in {package.partition(".")[0] for package in packages(name)}


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_sees_the_imports_that_python_sees(name):
    # Transformers reads lines, docstrings included, and does not understand `from . import` or folders.
    assert set(get_relative_imports(MODULES[name])) == imports(name)
    assert all(node.level <= 1 for node in nodes(name) if isinstance(node, ast.ImportFrom))


FORBIDDEN_PACKAGES = {
    *("aiohttp", "asyncio", "ctypes", "ftplib", "http", "importlib", "marshal", "multiprocessing", "os", "pickle"),
    *("pty", "runpy", "shelve", "shutil", "smtplib", "socket", "ssl", "subprocess", "tempfile", "urllib", "xmlrpc"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "torch.hub", "torch.save"}
FORBIDDEN_METHODS = {"from_pretrained", "push_to_hub", "cached_file", "hf_hub_download", "snapshot_download"}


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_code_needs_torch_and_transformers_and_reaches_for_nothing_else(name):
    roots = {package.partition(".")[0] for package in packages(name)}
    assert roots <= {"torch", "transformers"} | sys.stdlib_module_names
    assert not roots & FORBIDDEN_PACKAGES
    called = {node.func.id for node in nodes(name) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & FORBIDDEN_CALLS
    attributes = [node for node in nodes(name) if isinstance(node, ast.Attribute)]
    assert not {ast.unparse(node) for node in attributes} & FORBIDDEN_ATTRIBUTES
    assert not {node.attr for node in attributes} & FORBIDDEN_METHODS


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_owns(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
