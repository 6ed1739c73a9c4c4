"""The command line of lm-evaluation-harness, which knows the model `flashdlm`."""

from lm_eval.__main__ import cli_evaluate

from . import harness  # noqa: F401  registers the model


if __name__ == "__main__":
    cli_evaluate()
