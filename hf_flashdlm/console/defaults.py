"""Defaults of the command line that its help texts name; imports nothing, so that the help is quick."""

MAX_NEW_TOKENS = 128  # where neither the caller nor the checkpoint names a length
