"""Trains the embedded model pair on word problems, evaluates it and writes it to `hf_flashdlm/tiny/`.

    python examples/tiny/train.py            # about 35 minutes on two free CPU cores
    python examples/tiny/train.py --smoke    # the same path in under a minute; the models learn nothing

1. `ar`: a small autoregressive model learns the problems.
2. `guider`: a smaller model is stopped early, so that it is a fallible guide.
3. `dlm`: the first model is grown to three times its depth and learns masked diffusion.
4. `evaluate`: the rounded weights decode held-out problems with the plain decoder of `decoding.py`.

Two single-threaded ranks average their gradients; on a CPU this is faster than one process with two threads.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2ForCausalLM

from batches import Rows, causal_batches, diffusion_batches
from decoding import continue_greedily, decode, exact_match
from networks import (
    AR_SIZE,
    DLM_SIZE,
    GUIDER_SIZES,
    build_guider,
    build_network,
    export_dlm,
    export_guider,
    grow,
    num_parameters,
    round_weights,
)
from optimization import Plan, train
from problems import Problem, held_out_problems
from tokenizer import build_tokenizer


REPOSITORY = Path(__file__).parents[2]
STAGES = ("ar", "guider", "dlm", "evaluate")
EXAM_SEED = 2026
EMBEDDED_GUIDER = "medium"
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


@dataclass(frozen=True)
class Run:
    """The data that all stages of a rank share."""

    rank: int
    options: argparse.Namespace
    tokenizer: PreTrainedTokenizerFast
    exam: list[Problem]

    def log(self, **record) -> None:
        """Appends one line to the training log; only rank 0 writes."""
        if self.rank == 0:
            with (self.options.work / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def rows(self, seed: int) -> Rows:
        """Training rows that no other stage and no other rank sees."""
        return Rows(self.tokenizer, seed=1000 * self.options.seed + 10 * seed + self.rank)


def main() -> None:
    options = parse_options()
    os.environ.update(RANK_ENVIRONMENT)
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.start_processes(run_rank, args=(options,), nprocs=options.ranks, start_method="spawn")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY, help="repository the results are written into")
    parser.add_argument("--work", type=Path, help="checkpoints between the stages; a new temporary folder by default")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ar-steps", type=int, default=900)
    parser.add_argument("--guider-steps", type=int, default=330)
    parser.add_argument(
        "--guider-size",
        choices=GUIDER_SIZES,
        default=EMBEDDED_GUIDER,
        help="other sizes are written to examples/tiny/guiders",
    )
    parser.add_argument("--dlm-steps", type=int, default=2070)
    parser.add_argument("--dlm-minutes", type=float, default=1e9, help="end the diffusion stage after this long")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per rank and step of the causal stages")
    parser.add_argument("--tokens", type=int, default=5120, help="positions per rank and step of the diffusion stage")
    parser.add_argument("--quick-exam-size", type=int, default=96, help="problems of an exam during training")
    parser.add_argument("--exam-size", type=int, default=500, help="problems of the last exam")
    parser.add_argument("--compile", action="store_true", help="compile the diffusion stage (2 minutes, then 1.3x)")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny settings, to see that all runs; the repository is not changed",
    )
    options = parser.parse_args()
    options.work = options.work or Path(tempfile.mkdtemp(prefix="flashdlm_tiny_"))
    if options.smoke:
        if options.out == REPOSITORY:
            options.out = options.work
        small = {
            "ar_steps": 3,
            "guider_steps": 3,
            "dlm_steps": 3,
            "batch_size": 4,
            "tokens": 512,
            "exam_size": 2,
            "quick_exam_size": 2,
        }
        vars(options).update(small)
    return options


def run_rank(rank: int, options: argparse.Namespace) -> None:
    """Runs the chosen stages as one of `options.ranks` processes."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rendezvous = f"file://{options.work / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=options.ranks)
    tokenizer = build_tokenizer()
    run = Run(rank, options, tokenizer, held_out_problems(max(600, options.exam_size), EXAM_SEED))
    stages = {"ar": train_ar, "guider": train_guider, "dlm": train_dlm, "evaluate": evaluate}
    for stage in options.stages:
        stages[stage](run)
        dist.barrier()
    dist.destroy_process_group()


def train_ar(run: Run) -> None:
    """Stage 1: the autoregressive model that the diffusion model grows from."""
    network = build_network(AR_SIZE, run.tokenizer)
    plan = Plan("ar", run.options.ar_steps, muon_lr=6e-3, adamw_lr=3e-3, flat=0.6)
    train(network, causal_batches(run.rows(seed=1), run.options.batch_size), plan, run.log)
    record_exam(run, "ar", continue_greedily, network, run.options.quick_exam_size)
    torch.save(network.state_dict(), run.options.work / "ar.pt")


def train_guider(run: Run) -> None:
    """Stage 2: the guider, a fraction of the diffusion model and stopped before it is perfect."""
    size, is_embedded = run.options.guider_size, run.options.guider_size == EMBEDDED_GUIDER
    network = build_guider(size, run.tokenizer)
    dlm_parameters = num_parameters(build_network(DLM_SIZE, run.tokenizer))
    is_small = 4 * num_parameters(network) <= dlm_parameters
    assert is_small or not is_embedded, "the guider must be at most a quarter of the diffusion model"
    plan = Plan("guider", run.options.guider_steps, muon_lr=6e-3, adamw_lr=3e-3, flat=0.6)
    train(network, causal_batches(run.rows(seed=2), run.options.batch_size), plan, run.log)
    record_exam(run, "guider", continue_greedily, network, run.options.quick_exam_size)
    torch.save(network.state_dict(), run.options.work / "guider.pt")
    if run.rank == 0:
        folder = "hf_flashdlm/tiny/guider" if is_embedded else f"examples/tiny/guiders/{size}"
        export_guider(network, run.tokenizer, run.options.out / folder)


def train_dlm(run: Run) -> None:
    """Stage 3: the diffusion model, grown from the autoregressive model."""
    ar = build_network(AR_SIZE, run.tokenizer)
    ar.load_state_dict(torch.load(run.options.work / "ar.pt"))
    network = build_network(DLM_SIZE, run.tokenizer, causal=False)
    grow(ar, network)
    check_bidirectional(network)
    if run.options.compile:
        network.model.compile(dynamic=True)

    def checkpoint() -> None:
        copy = build_network(DLM_SIZE, run.tokenizer, causal=False)
        copy.load_state_dict(network.state_dict())
        record_exam(run, "dlm", decode, round_weights(copy), run.options.quick_exam_size, block_length=8)
        torch.save(copy.state_dict(), run.options.work / "dlm.pt")
        if run.rank == 0:
            export_dlm(copy, run.tokenizer, run.options.out / "hf_flashdlm/tiny/dlm")

    steps, minutes = run.options.dlm_steps, run.options.dlm_minutes
    plan = Plan("dlm", steps, muon_lr=2e-3, adamw_lr=1e-3, flat=0.2, minutes=minutes, warmup_steps=150)
    batches = diffusion_batches(run.rows(seed=3), run.options.tokens, seed=run.options.seed + run.rank)
    train(network, batches, plan, run.log, checkpoint)


def check_bidirectional(network: Qwen2ForCausalLM) -> None:
    """Asserts that the last token reaches position 0, which Transformers' attention does not allow by default."""
    ids = torch.arange(8).unsqueeze(0)
    other_ids = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
    with torch.no_grad():
        assert not torch.equal(network(ids).logits[0, 0], network(other_ids).logits[0, 0]), "attention is causal"


def evaluate(run: Run) -> None:
    """Stage 4: decodes the held-out problems with the rounded weights, and writes problems, log and results."""
    dlm = build_network(DLM_SIZE, run.tokenizer, causal=False)
    dlm.load_state_dict(torch.load(run.options.work / "dlm.pt"))
    guider = build_guider(run.options.guider_size, run.tokenizer)
    guider.load_state_dict(torch.load(run.options.work / "guider.pt"))
    round_weights(dlm), round_weights(guider)
    size = run.options.exam_size
    scores = {"guider alone": record_exam(run, "final", continue_greedily, guider, size)}
    for block_length in (1, 4, 8, 16, 64):
        name = f"one token per step, block {block_length}"
        scores[name] = record_exam(run, "final", decode, dlm, size, block_length=block_length)
    for block_length in (8, 16):
        name = f"threshold 0.9, block {block_length}"
        scores[name] = record_exam(run, "final", decode, dlm, size, block_length=block_length, threshold=0.9)
    scores["guided, block 64"] = record_exam(run, "final", decode, dlm, size, block_length=64, guider=guider)
    if run.rank == 0:
        write_results(run, scores, {"dlm": num_parameters(dlm), "guider": num_parameters(guider)})


def record_exam(
    run: Run, stage: str, decoder: Callable, network: PreTrainedModel, size: int, **options
) -> dict[str, float]:
    """Exact match and mean number of forwards of `decoder` on the first `size` exam problems, shared by the ranks."""
    exam = run.exam[:size]
    counts = torch.tensor(exact_match(decoder, network, run.tokenizer, exam[run.rank :: run.options.ranks], **options))
    dist.all_reduce(counts)
    score = {"exact_match": counts[0].item() / len(exam), "nfe": counts[1].item() / len(exam)}
    settings = {name: value for name, value in options.items() if name != "guider"} | {"guided": "guider" in options}
    run.log(stage=stage, problems=len(exam), **settings, **score)
    return score


def write_results(run: Run, scores: dict[str, dict[str, float]], parameters: dict[str, int]) -> None:
    """Writes the held-out problems and the results next to the weights, and the log next to this script."""
    records = [json.loads(line) for line in (run.options.work / "log.jsonl").read_text().splitlines()]
    cpu_minutes = {}
    for record in records:
        if "cpu_seconds" in record:
            cpu_minutes[record["stage"]] = round(record["cpu_seconds"] / 60, 1)
    results = {
        "problems": run.options.exam_size,
        "max_new_tokens": 64,
        "scores": scores,
        "parameters": parameters,
        "cpu_minutes": cpu_minutes,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    here = run.options.out / "examples/tiny"
    here.mkdir(parents=True, exist_ok=True)
    shutil.copy(run.options.work / "log.jsonl", here / "log.jsonl")
    package = run.options.out / "hf_flashdlm/tiny"
    (package / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with (package / "problems.jsonl").open("w") as file:
        for problem in run.exam:
            file.write(json.dumps(asdict(problem)) + "\n")


if __name__ == "__main__":
    main()
