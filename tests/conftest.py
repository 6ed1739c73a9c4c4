"""Set-up of the whole suite: no network, few threads."""

import os

# Read by the libraries when they are imported, so they are set before that.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(1)  # the tensors are tiny, and workers run side by side
