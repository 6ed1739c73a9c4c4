"""The house: which module may import which, and what the exported ones must not do."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import hf_flashdlm


PACKAGE = Path(hf_flashdlm.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py")}
ENTRIES = ("generate", "modeling_dream", "modeling_llada")

# From the bottom to the top: a module imports from layers below its own. Commands and publishing stand above them all.
LAYERS = (
    "cache compiling configuration_dream configuration_llada display gate generation_config outputs processors "
    "schedule streaming tokenization_dream unmasking windows",
    "denoiser reading",
    "alignment denoising",
    "guider",
    "methods",
    "generation",
    "generate modeling_dream modeling_llada",
    "__init__",
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def exported():
    """What the host finds when it follows the relative imports of the three entries."""
    files = {str(MODULES[name]) for name in ENTRIES}
    for name in ENTRIES:
        files.update(get_relative_import_files(MODULES[name]))
    return sorted(Path(file).stem for file in files)


EXPORTED = exported()


def nodes(name):
    return list(ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))))


def siblings(name):
    """Modules of the package that `name` imports."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.update([node.module] if node.module else ["__init__"])
    return found


def packages(name):
    """Everything else that it imports."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", LEVELS)
def test_imports_point_down(name):
    above = {one for one in siblings(name) if LEVELS.get(one, len(LAYERS)) >= LEVELS[name]}
    assert not above, f"{name} imports {above}, which stands above or beside it"


def test_there_is_no_circle_and_nothing_imports_the_commands():
    graph = {name: siblings(name) for name in MODULES}
    assert list(TopologicalSorter(graph).static_order())
    assert [name for name in graph if "cli" in graph[name]] == ["__main__"]


def test_the_export_is_the_decoder_and_the_models():
    assert set(EXPORTED) == set(LEVELS) - {"__init__", "display", "tokenization_dream"}


@pytest.mark.parametrize("name", EXPORTED)
def test_the_host_sees_the_imports_that_python_sees(name):
    # The host reads lines, docstrings included, and knows no `from . import` and no folders.
    assert set(get_relative_imports(MODULES[name])) == siblings(name)
    assert siblings(name) <= set(MODULES)
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
