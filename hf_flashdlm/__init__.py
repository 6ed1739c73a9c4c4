"""Fast decoding of masked diffusion language models with Hugging Face transformers.

Importing the package registers its model classes with the Auto classes.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoProcessor,
    AutoTokenizer,
)

from .block_causal import make_block_causal
from .blocks import AdaptiveBlocks, BlockPolicy, FixedBlocks
from .cache import FreeCache
from .canvas_processors import CanvasProcessor
from .configuration_a2d import A2DLlamaConfig, A2DQwen2Config, A2DQwen3Config
from .configuration_dream import DreamConfig
from .configuration_fast_dllm_v2 import Fast_dLLM_QwenConfig
from .configuration_lavida import LavidaDreamConfig, LavidaLLaDAConfig, LLaDAVConfig
from .configuration_llada import LLaDAConfig
from .configuration_llada2 import LLaDA2MoeConfig
from .configuration_llada_moe import LLaDAMoEConfig
from .configuration_mmada import MMadaConfig
from .configuration_open_dcoder import OpenDCoderConfig
from .configuration_sdar import SDARConfig, SDARMoeConfig
from .console.display import CanvasStreamer
from .data_collator import DataCollatorForMaskedDiffusion
from .generation_config import DiffusionOptions
from .generation_mixin import FlashDLMGenerationMixin, diffusion_generate, make_bidirectional
from .generation_output import DiffusionGenerationOutput
from .guider import ARGuider, ProductMixture
from .log_likelihood import LogLikelihoodOutput, log_likelihood, perplexity
from .methods import METHODS
from .modeling_a2d import A2DLlamaLMHeadModel, A2DQwen2LMHeadModel, A2DQwen3LMHeadModel
from .modeling_dream import DreamModel
from .modeling_fast_dllm_v2 import Fast_dLLM_QwenForCausalLM
from .modeling_lavida import LlavaDreamForMaskedDiffusion, LlavaLladaForMaskedDiffusion, LlavaLLaDAModelLM
from .modeling_llada import LLaDAModelLM
from .modeling_llada2 import LLaDA2MoeModelLM
from .modeling_llada_moe import LLaDAMoEModelLM
from .modeling_mmada import MMadaModelLM
from .modeling_open_dcoder import OpenDCoderModel
from .modeling_sdar import SDARForCausalLM, SDARMoeForCausalLM
from .processing_original import LavidaProcessor
from .schedule import BlockSchedule, LinearSchedule, Schedule, ShiftSchedule
from .tokenization_dream import DreamTokenizer
from .unmasking import Confidence, Drafts, EntropyBudget, MostConfident, TokenEditing, UnmaskingRule
from .unsupported import REFUSED
from .version import __version__
from .windows import BlockWindow, DKVWindow, FreeCacheWindow, FullWindow, SubBlockWindow, Window, WindowPolicy


__all__ = [
    "METHODS",
    "A2DLlamaConfig",
    "A2DLlamaLMHeadModel",
    "A2DQwen2Config",
    "A2DQwen2LMHeadModel",
    "A2DQwen3Config",
    "A2DQwen3LMHeadModel",
    "ARGuider",
    "AdaptiveBlocks",
    "BlockPolicy",
    "BlockSchedule",
    "BlockWindow",
    "CanvasProcessor",
    "CanvasStreamer",
    "Confidence",
    "DKVWindow",
    "DataCollatorForMaskedDiffusion",
    "DiffusionGenerationOutput",
    "DiffusionOptions",
    "Drafts",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "EntropyBudget",
    "Fast_dLLM_QwenConfig",
    "Fast_dLLM_QwenForCausalLM",
    "FixedBlocks",
    "FlashDLMGenerationMixin",
    "FreeCache",
    "FreeCacheWindow",
    "FullWindow",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "LLaDAVConfig",
    "LavidaDreamConfig",
    "LavidaLLaDAConfig",
    "LavidaProcessor",
    "LinearSchedule",
    "LlavaDreamForMaskedDiffusion",
    "LlavaLLaDAModelLM",
    "LlavaLladaForMaskedDiffusion",
    "LogLikelihoodOutput",
    "MMadaConfig",
    "MMadaModelLM",
    "MostConfident",
    "OpenDCoderConfig",
    "OpenDCoderModel",
    "ProductMixture",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "Schedule",
    "ShiftSchedule",
    "SubBlockWindow",
    "TokenEditing",
    "UnmaskingRule",
    "Window",
    "WindowPolicy",
    "__version__",
    "diffusion_generate",
    "log_likelihood",
    "make_bidirectional",
    "make_block_causal",
    "perplexity",
]

_MODELS: dict[Any, type] = {
    LLaDAConfig: LLaDAModelLM,
    DreamConfig: DreamModel,
    SDARConfig: SDARForCausalLM,
    SDARMoeConfig: SDARMoeForCausalLM,
    A2DQwen3Config: A2DQwen3LMHeadModel,
    A2DQwen2Config: A2DQwen2LMHeadModel,
    A2DLlamaConfig: A2DLlamaLMHeadModel,
    Fast_dLLM_QwenConfig: Fast_dLLM_QwenForCausalLM,
    LLaDA2MoeConfig: LLaDA2MoeModelLM,
    OpenDCoderConfig: OpenDCoderModel,
    MMadaConfig: MMadaModelLM,
}
_VISION: dict[Any, type] = {
    LavidaLLaDAConfig: LlavaLladaForMaskedDiffusion,
    LavidaDreamConfig: LlavaDreamForMaskedDiffusion,
    LLaDAVConfig: LlavaLLaDAModelLM,
}
# The configurations of LLaDA and LaViDa make them, by the same `model_type`.
_SHARED: dict[Any, type] = {LLaDAMoEConfig: LLaDAMoEModelLM}
for _config, _model in _VISION.items():
    AutoProcessor.register(_config, LavidaProcessor)
    for _auto in (AutoModel, AutoModelForImageTextToText):
        _auto.register(_config, _model)
for _config in (*_MODELS, LavidaLLaDAConfig, LavidaDreamConfig, *REFUSED):
    AutoConfig.register(_config.model_type, _config)
for _config, _model in (_MODELS | _SHARED).items():
    for _auto in (AutoModel, AutoModelForCausalLM):
        _auto.register(_config, _model)
    if not _config.logits_shift:  # a masked language model scores each position in place
        AutoModelForMaskedLM.register(_config, _model)
for _config in (DreamConfig, LavidaDreamConfig):
    AutoTokenizer.register(_config, tokenizer_class=DreamTokenizer)
