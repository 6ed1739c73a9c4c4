"""Streaming of a decode through the streamers of Transformers.

Owns what a streamer is told and when: final text once and in order, drafts of the rest if it can show them.
"""

import torch


class Stream:
    r"""
    Feeds a streamer after every step.

    A streamer of Transformers gets `put` with the ids that have become final since the last call and, if it has the
    method, `put_draft` with the ids after them, mask tokens included. Final ids never change. Transformers allows one
    row only. A streamer with the attribute `shows_canvas` gets `put_draft` with the whole canvas of all rows instead.

    Args:
        streamer (`BaseStreamer`, *optional*): Without a streamer nothing is done.
        prompt_length (`int`): Length of the prompt, which Transformers has put already.
        skip (`int`): Number of leading columns of the canvas that the caller's prompt does not have.
    """

    def __init__(self, streamer, prompt_length: int, skip: int = 0):
        self.streamer, self.skip = streamer, skip
        self.final = prompt_length
        self.canvas: list[list[int]] = []  # the token lists of all rows, finished rows included

    def show(self, rows: list, final: list[int]) -> None:
        """Show the [`Row`]s of a state; the first `final` ids of each row never change again."""
        if self.streamer is None:
            return
        if getattr(self.streamer, "shows_canvas", False):
            self.canvas = self.canvas or [row.tokens for row in rows]
            self.streamer.put_draft(torch.tensor(self.canvas)[:, self.skip :])
            return
        canvas, end = torch.tensor([rows[0].tokens]), final[0]
        if end > self.final:
            self.streamer.put(canvas[0, self.final : end])
            self.final = end
        if end < canvas.shape[1] and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(canvas[:, end:])

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
