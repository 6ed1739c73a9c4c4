"""The page and its server: which models it shows, and where.

Owns what is checked before the models are loaded, and how Gradio is started. Knows nothing of the page's layout.
"""

import importlib.util
import socket

from ..console.checkpoint import Checkpoint
from ..guider import ARGuider
from ..tiny import pair_unless_named, sample_problems
from .run import Settings, methods, race


HOST = "127.0.0.1"
EXAMPLES = [
    "What is 17 times 23?",
    "Write a haiku about the sea.",
    "Name three planets and say how large each of them is.",
    "Explain in two sentences why the sky is blue.",
]
EXAMPLE_SEED = 11  # of the problems that the embedded pair is shown with


def check_gradio() -> None:
    """Refuse to go on without Gradio."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("`flashdlm app` needs Gradio, which is not installed: pip install 'hf-flashdlm[app]'.")


def check_address(host: str, port: int | None) -> None:
    """Refuse a place where the page could not be served, before the models are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port or 0), family=family):
            return
    except OverflowError as error:
        raise ValueError(f"`--port` must be between 1 and 65535, got {port}.") from error
    except (OSError, UnicodeError) as error:
        try:
            socket.create_server((host, 0), family=family).close()
        except (OSError, UnicodeError):
            raise ValueError(f"`--host` must be an address of this machine, got {host!r}.") from error
        raise ValueError(
            f"`--port` must be free, got {port}, which cannot be used: name another, or drop it."
        ) from error


def load_models(model: str | None, guider: str | None, device: str, dtype: str) -> tuple[Checkpoint, ARGuider | None]:
    """The models by folder or Hub repository, or the embedded pair where no `model` is named."""
    model, guider, guidance = pair_unless_named(model, guider)
    checkpoint = Checkpoint.load(model, device, dtype)
    return checkpoint, None if guider is None else checkpoint.load_guider(guider, device, dtype, **guidance)


def show_page(  # noqa: PLR0913, what the command line takes
    model: str | None = None,
    guider: str | None = None,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    r"""
    Serve the page until the program is interrupted.

    Args:
        model (`str`, *optional*): The diffusion model, a folder or a Hub repository; by default the embedded pair.
        guider (`str`, *optional*): The autoregressive model that judges drafts; without it there is no guided column.
        host (`str`, *optional*): The address to listen at; by default `GRADIO_SERVER_NAME`, else this machine alone.
        port (`int`, *optional*): By default the first free one from 7860 on.
        share (`bool`, *optional*, defaults to `False`): Whether Gradio's service gives the page a public address.
        device (`str`, *optional*, defaults to `"auto"`): As of [`Checkpoint.load`].
        dtype (`str`, *optional*, defaults to `"auto"`): As of [`Checkpoint.load`].

    Raises:
        ValueError: If Gradio is not installed, the place cannot be used, or a model does not load.
    """
    check_gradio()
    if host is not None or port is not None:
        check_address(host or HOST, port)
    checkpoint, judge = load_models(model, guider, device, dtype)
    from .page import LOOK, make_page

    examples = EXAMPLES if model is not None else [one.question for one in sample_problems(4, EXAMPLE_SEED)]
    warm_up(checkpoint, judge, examples[0])
    page = make_page(checkpoint, judge, examples)
    page.launch(server_name=host, server_port=port, share=share, **LOOK)


def warm_up(checkpoint: Checkpoint, guider: ARGuider | None, prompt: str) -> None:
    """Decode a token by each method, so that no visitor's clock counts what is made once."""
    settings = Settings(1, 1, 1.0)
    for _ in race(checkpoint, prompt, methods(settings, guider), settings):
        pass
