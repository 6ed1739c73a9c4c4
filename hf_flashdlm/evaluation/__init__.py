"""Scores of a diffusion model on the tasks of lm-evaluation-harness, which the extra `eval` installs."""
