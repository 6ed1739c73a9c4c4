"""What `flashdlm demo` can be told, with the defaults that its help names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    r"""
    Settings of a demonstration.

    Args:
        problems (`int`): Size of the measured sample of held-out problems.
        batch_size (`int`): Problems decoded together.
        repeats (`int`): Runs of each method; their median is the time.
        show (`int`): Problems of the sample that are decoded in view, one at a time.
        slow (`int`): On a terminal they are replayed this many times slower than they were decoded, or if 0 not at
            all.
        seed (`int`): Seed of the draw of the sample. Decoding is greedy and draws nothing.
    """

    problems: int = 100
    batch_size: int = 25
    repeats: int = 1
    show: int = 3
    slow: int = 20
    seed: int = 0
