"""The script `flashdlm`, which answers `--help`, `--version` and a mistake in the arguments at once.

Importing `hf_flashdlm` imports torch and Transformers, which takes seconds. So this module, which lies beside the
package, makes the package known without running it, reads the arguments, and runs it before a command does.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Run the command line on the program's own arguments; returns the exit code."""
    spec = find_spec("hf_flashdlm")
    package = sys.modules["hf_flashdlm"] = module_from_spec(spec)
    from hf_flashdlm.cli import main as run

    return run(prepare=lambda: spec.loader.exec_module(package))


if __name__ == "__main__":
    sys.exit(main())
