"""The optimisation loop of the embedded model pair: loss, learning rate, averaged gradients, training log.

Knows nothing of problems, masking or checkpoints: it gets batches and calls back.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from batches import Batch


LOG_STEPS = 20


@dataclass(frozen=True)
class Plan:
    """One stage of training: its length in `steps` (or `minutes`, if they pass first: the learning rate follows), the
    peak learning rates of Muon (matrices) and AdamW (the rest), and the share of the stage before the linear decay."""

    stage: str
    steps: int
    muon_lr: float
    adamw_lr: float
    flat: float
    minutes: float = 1e9
    warmup_steps: int = 30


def train(
    network: PreTrainedModel,
    batches: Iterator[Batch],
    plan: Plan,
    log: Callable[..., None],
    checkpoint: Callable[[], None] = lambda: None,
    checkpoint_minutes: float = 5.0,
) -> None:
    """Trains `network` by `plan`. Every rank calls it with batches of its own and ends with the same weights.

    `log` takes one record as keywords; `checkpoint` is called every `checkpoint_minutes` and at the end.
    """
    optimizers = build_optimizers(network, plan)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    started, cpu_started = time.monotonic(), time.process_time()
    progress, samples, next_checkpoint = 0.0, 0, checkpoint_minutes
    for step in range(plan.steps):
        factor = learning_rate_factor(step, max(progress, step / plan.steps), plan)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        batch = next(batches)
        loss = weighted_loss(network, batch)
        loss.backward()
        minutes, cpu_seconds = (time.monotonic() - started) / 60, time.process_time() - cpu_started
        shared = torch.tensor([loss.item(), len(batch.input_ids), minutes, cpu_seconds]) / dist.get_world_size()
        loss, rows, minutes, cpu_seconds = average_gradients(parameters, shared).tolist()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        samples += round(rows * dist.get_world_size())
        progress = minutes / plan.minutes
        if step % LOG_STEPS == 0:
            record = {"loss": round(loss, 4), "lr": plan.muon_lr * factor, "samples": samples}
            log(stage=plan.stage, step=step, **record, cpu_seconds=round(cpu_seconds * dist.get_world_size(), 1))
        if progress >= 1:
            break
        if minutes >= next_checkpoint:
            checkpoint()
            next_checkpoint += checkpoint_minutes
    checkpoint()


def build_optimizers(network: PreTrainedModel, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, head, norms and biases."""
    matrices = [p for p in network.model.layers.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(matrices, lr=plan.muon_lr, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=plan.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer, peak_lr in ((muon, plan.muon_lr), (adamw, plan.adamw_lr)):
        optimizer.param_groups[0]["peak_lr"] = peak_lr
    return [muon, adamw]


def learning_rate_factor(step: int, progress: float, plan: Plan) -> float:
    """Share of the peak learning rate at `progress` in 0 ... 1: linear warm-up, flat, linear decay to 0."""
    return min(1.0, (step + 1) / plan.warmup_steps, max(0.0, (1 - progress) / (1 - plan.flat)))


def weighted_loss(network: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy per row of the weighted targets, each predicted from the position before it."""
    row, position = batch.weights.nonzero(as_tuple=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        logits = network.lm_head(hidden[row, position - 1])
    loss = F.cross_entropy(logits.float(), batch.target_ids[row, position], reduction="none")
    return (loss * batch.weights[row, position]).sum() / len(batch.weights)


def average_gradients(parameters: list[nn.Parameter], shared: Tensor) -> Tensor:
    """Replaces each gradient by its mean over the ranks, and returns the sum over the ranks of `shared` (1-d)."""
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() / dist.get_world_size() for g in gradients] + [shared])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients] + [len(shared)]), strict=False):
        gradient.copy_(mean.view_as(gradient))
    return flat[-len(shared) :]
