"""Prompts and texts at a terminal: a checkpoint with its tokenizer, the canvas in view, a conversation."""
