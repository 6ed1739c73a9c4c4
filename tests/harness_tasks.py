"""Tasks of lm-evaluation-harness on the embedded problems: one to write, one to choose, one to read."""

import json

from hf_flashdlm.tiny import FOLDER, problems


QUESTIONS = [problem.question for problem in problems(12)[:12]]
HEAD = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
TASKS = {
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{final}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 40, "do_sample": False},
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": "#### (\\d+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{['#### ' + final|string, '#### ' + (final + 1)|string]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity"}],
    },
}


def write_tasks(folder):
    """Write the task files to a folder, which the harness reads as YAML."""
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(FOLDER / "problems.jsonl")}, "cache_dir": str(folder / "cache")}
        text = json.dumps({"task": name, **HEAD, **task, "dataset_kwargs": data})
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder
