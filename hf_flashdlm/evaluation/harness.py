"""`flashdlm` among the models of lm-evaluation-harness: texts by `generate`, likelihoods by Monte Carlo.

Owns what a task asks of the model and what an answer costs. The harness's own class for Transformers loads, batches,
fills in chat templates and cuts at stop sequences. Knows nothing of which tasks and methods are compared.
"""

import random
import time
from dataclasses import fields

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..bench.machine import synchronize
from ..bench.run import Run
from ..console.checkpoint import Checkpoint
from ..generation_config import DiffusionOptions
from ..guider import ARGuider
from ..hub.loading import load_diffusion_config, set_mask_token
from ..log_likelihood import log_likelihood


# Options of `generate` that `--model_args` may hold; the harness has its own for what a task decides.
OPTIONS = {field.name for field in fields(DiffusionOptions)} | {"guidance_scale"}


@register_model("flashdlm")
class FlashDLM(HFLM):
    r"""
    A diffusion model, as `lm_eval --model flashdlm` evaluates it.

    Args:
        pretrained (`str` or `PreTrainedModel`): A folder, a Hub repository, or the model itself.
        guider (`str` or [`ARGuider`], *optional*): The autoregressive model that judges the drafts.
        num_samples (`int`, *optional*, defaults to 128): Samples of each log-likelihood, see [`log_likelihood`].
        seed (`int`, *optional*, defaults to 0): Seed of those samples.
        kwargs: All options of a decode, such as `method`, `window_policy` or `steps`; settings of the guider, such as
            `guider_top_k`; and what the harness's `hf` takes, such as `batch_size` and `dtype`.

    Raises:
        ValueError: If it is no diffusion model, or an option has another form.
    """

    def __init__(self, pretrained, guider=None, num_samples: int = 128, seed: int = 0, **kwargs):
        self.options = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
        names = [name for name in kwargs if name.startswith("guider_")]
        rule = {name.removeprefix("guider_"): kwargs.pop(name) for name in names}
        if guider is None and rule:
            raise ValueError(f"`{names[0]}` belongs to `guider`: drop it, or name a guider.")
        if not str(kwargs.get("batch_size", 1)).isdecimal():
            raise ValueError(f"`batch_size` must be a number, got {kwargs['batch_size']!r}.")
        super().__init__(pretrained, **{"backend": "causal"} | kwargs)
        self.num_samples, self.seed, self.guider, self.run = num_samples, seed, guider, Run()
        if isinstance(guider, str):
            dtype = str(self.model.dtype).removeprefix("torch.")
            checkpoint = Checkpoint(self.model, self.tokenizer)
            self.guider: ARGuider = checkpoint.load_guider(guider, str(self.device), dtype, **rule)

    def _get_config(self, pretrained: str, **kwargs) -> None:
        self._config = load_diffusion_config("pretrained", pretrained)

    def _create_model(self, pretrained: str, *args, **kwargs) -> None:
        super()._create_model(pretrained, *args, config=self.config, **kwargs)
        set_mask_token("pretrained", pretrained, self._model.config, self.tokenizer)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text; the harness counts no position for its last one, which needs one here."""
        return super().max_length - 1

    def _model_generate(self, context, max_length: int, stop: list[str], attention_mask=None, **generation_kwargs):
        """Continue a batch of prompts: their tokens, then those of the answers up to their ends."""
        if generation_kwargs.get("temperature") == 0:
            generation_kwargs |= {"temperature": None, "do_sample": False}
        options = self.options | {name: value for name, value in generation_kwargs.items() if value is not None}
        if options.get("stop_at_eos", True):
            options |= {"stop_strings": stop, "tokenizer": self.tokenizer}
        if self.guider is not None:
            options["guider"] = self.guider
        started = self._now()
        output = self.model.generate(
            context,
            attention_mask=attention_mask,
            max_new_tokens=max_length - context.shape[1],
            return_dict_in_generate=True,
            **options,
        )
        self.run.seconds += self._now() - started
        self.run.count(output)
        return self._up_to_ends(output, context.shape[1])

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def _up_to_ends(self, output, start: int) -> torch.Tensor:
        """The sequences with the end token from their first end on, all of whose tokens are counted."""
        ends = torch.tensor(sorted(Checkpoint(self.model, self.tokenizer).end_token_ids), device=self.device)
        answers = output.sequences[:, start:]
        ended = torch.isin(answers, ends).cumsum(1) > 0
        lengths = (output.tokens_per_forward * output.nfe).round().long()
        self.run.num_rows += len(answers)
        self.run.tokens += int(torch.minimum(lengths, (~ended).sum(1).cpu() + 1).sum())
        output.sequences[:, start:] = answers.masked_fill(ended, self.eot_token_id)
        return output.sequences

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each prompt and answer the estimate, and whether a decode of one token per step gives the answer."""
        results = []
        for texts, prompt, answer in tqdm(requests, "Running loglikelihood requests", disable=disable_tqdm):
            room = self.max_length + 1 - len(answer)
            if room < 1:
                raise ValueError(
                    f"a continuation must be at most {self.max_length} tokens long, got {len(answer)}: leave out its "
                    "task."
                )
            started, prompt = self._now(), prompt[-room:]
            output = log_likelihood(
                self.model,
                [prompt],
                [answer],
                num_samples=self.num_samples if len(answer) > 1 else 1,  # all samples of a single token are the same
                batch_size=override_bs or int(self.batch_size),
                guidance_scale=self.options.get("guidance_scale", 1.0),
                mask_token_id=self.options.get("mask_token_id"),
                generator=self._generator(prompt, answer),
            )
            # A text without a request of its own is a piece of one, of which the estimate alone is asked.
            result = float(output.log_likelihood), texts is not None and self._is_written(prompt, answer)
            self.run.seconds += self._now() - started
            self.run.nfe += output.nfe
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
            results.append(result)
        return results

    def _generator(self, prompt: list[int], answer: list[int]) -> torch.Generator:
        """A source of randomness that depends on the seed and the texts alone, not on what was estimated before."""
        draw = random.Random(f"{self.seed} {prompt} {answer}").getrandbits(63)
        return torch.Generator().manual_seed(draw)

    def _is_written(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether `answer` is what a decode of one token per step writes after `prompt`."""
        options = {name: self.options[name] for name in ("guidance_scale", "mask_token_id") if name in self.options}
        ids = self.model.generate(
            torch.tensor([prompt], device=self.device),
            method="llada",
            max_new_tokens=len(answer),
            stop_at_eos=False,
            do_sample=False,
            **options,
        )
        return ids[0, len(prompt) :].tolist() == list(answer)
