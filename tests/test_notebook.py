"""The notebook: its cells run in order and print what it shows."""

import contextlib
import io
import json

from pages import ROOT


def test_the_cells_print_the_answers_that_the_notebook_shows():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    assert "".join(cells[0]["source"]) == "%pip install --quiet .."
    for cell in cells[1:]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), names)  # as a kernel does
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        # The number of steps may depend on the machine, the answers do not.
        assert printed.getvalue().count("#### 26") == shown.count("#### 26")
        assert bool(printed.getvalue()) == bool(shown)
