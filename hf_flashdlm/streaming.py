"""Streaming of a decode through the streamers of the host.

Owns what a streamer is told and when: final text once and in order, drafts of the rest where it can show them.
"""

import torch


class Stream:
    r"""
    Feeds a streamer after every step.

    A streamer of the host gets `put` with the ids that have become final since the last call, never to be taken back,
    and, if it has the method, `put_draft` with the ids behind them, mask tokens included; one row only, as the host
    says. A streamer with the attribute `shows_canvas` gets `put_draft` with the whole canvas of all rows instead.

    Args:
        streamer (`BaseStreamer`, *optional*): Nothing is done without one.
        prompt_length (`int`): The prompt, which the host has put already.
        skip (`int`): Columns of the canvas that the caller's prompt does not have.
    """

    def __init__(self, streamer, prompt_length: int, skip: int = 0):
        self.streamer, self.skip = streamer, skip
        self.final = prompt_length
        self.canvas = None  # (B, L) of the whole batch, finished rows as they ended

    def show(self, canvas: torch.LongTensor, rows: torch.LongTensor, final: torch.LongTensor) -> None:
        """Show the canvas `(B, L)` of the rows `rows` `(B,)` of the batch, whose first `final` `(B,)` ids stay."""
        if self.streamer is None:
            return
        if getattr(self.streamer, "shows_canvas", False):
            if self.canvas is None:
                self.canvas = canvas.clone()
            self.canvas[rows] = canvas
            self.streamer.put_draft(self.canvas[:, self.skip :])
            return
        end = int(final[0])
        if end > self.final:
            self.streamer.put(canvas[0, self.final : end])
            self.final = end
        if end < canvas.shape[1] and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(canvas[:, end:])

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
