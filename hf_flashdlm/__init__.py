"""Fast decoding of masked diffusion language models with Hugging Face transformers.

Importing the package registers LLaDA and Dream with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from .blocks import AdaptiveBlocks, BlockPolicy, FixedBlocks
from .cache import FreeCache
from .canvas_processors import CanvasProcessor
from .configuration_dream import DreamConfig
from .configuration_llada import LLaDAConfig
from .console.display import CanvasStreamer
from .generation_config import DiffusionOptions
from .generation_mixin import FlashDLMGenerationMixin, diffusion_generate, make_bidirectional
from .generation_output import DiffusionGenerationOutput
from .guider import ARGuider, ProductMixture
from .methods import METHODS
from .modeling_dream import DreamModel
from .modeling_llada import LLaDAModelLM
from .schedule import Schedule
from .tokenization_dream import DreamTokenizer
from .unmasking import Confidence, Drafts, MostConfident, UnmaskingRule
from .version import __version__
from .windows import BlockWindow, DKVWindow, FreeCacheWindow, FullWindow, Window, WindowPolicy


__all__ = [
    "METHODS",
    "ARGuider",
    "AdaptiveBlocks",
    "BlockPolicy",
    "BlockWindow",
    "CanvasProcessor",
    "CanvasStreamer",
    "Confidence",
    "DKVWindow",
    "DiffusionGenerationOutput",
    "DiffusionOptions",
    "Drafts",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "FixedBlocks",
    "FlashDLMGenerationMixin",
    "FreeCache",
    "FreeCacheWindow",
    "FullWindow",
    "LLaDAConfig",
    "LLaDAModelLM",
    "MostConfident",
    "ProductMixture",
    "Schedule",
    "UnmaskingRule",
    "Window",
    "WindowPolicy",
    "__version__",
    "diffusion_generate",
    "make_bidirectional",
]

for _config, _model in ((LLaDAConfig, LLaDAModelLM), (DreamConfig, DreamModel)):
    AutoConfig.register(_config.model_type, _config)
    for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        _auto.register(_config, _model)
AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer)
