"""Several processes that share a command, as `accelerate launch` and `torchrun` start them.

Owns their numbers, the device of each, and what they tell each other. Knows nothing of what they do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Processes:
    """This process is `number` of `count`, from 0 on."""

    number: int = 0
    count: int = 1

    @classmethod
    @contextmanager
    def joined(cls, args) -> Iterator["Processes"]:
        """The processes that the launcher started; `args.device` becomes the one of this process."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            yield cls()
            return
        from accelerate import PartialState

        # A process that is done waits for the others, however long they take.
        state = PartialState(cpu=args.device == "cpu", timeout=timedelta(weeks=4))
        if args.device == "auto":
            args.device = str(state.device)
        yield cls(state.process_index, state.num_processes)
        state.destroy_process_group()

    def agree(self, values: dict) -> None:
        """Refuse to go on if `values` are not the same in all processes."""
        for number, others in enumerate(self.gather(values)):
            changed = [name for name in values if values[name] != others[name]]
            if changed:
                raise ValueError(
                    f"all processes must have the same {changed[0]}, got {values[changed[0]]!r} in process "
                    f"{self.number} and {others[changed[0]]!r} in process {number}: start all of them alike."
                )

    def gather(self, value) -> list:
        """The `value` of each process."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.gather(None)
