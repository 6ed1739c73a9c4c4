"""Answers in a file, a line for each prompt in the order of the prompts, written so that no kill loses or doubles one.

While a run goes on, each of its processes appends what it has done to a file of its own beside the output. When all is
done, one of them writes the output in a single move. `OUTPUT.run` says which run the output belongs to. Knows nothing
of prompts or of models.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path


class AnswerFile:
    r"""
    The output of a run, and what is kept of it until it is done.

    Args:
        path (`Path`): The output.
        run (`dict`): All that decides the answers, by the name of the argument; a file of another run is refused.
        process (`int`, *optional*, defaults to 0): The number of this process.

    Raises:
        ValueError: If there are files of another run.
    """

    def __init__(self, path: Path, run: dict, process: int = 0):
        self.path, self.run = path, run
        self.key = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
        self.run_path, self.part_path = (path.with_name(path.name + end) for end in (".run", f".part{process}"))
        self._check()

    def _check(self) -> None:
        """Refuse files of another run."""
        place = f"`--output` must be a new file or one of the same run, got {str(self.path)!r}"
        if not self.run_path.exists():
            if self.path.exists() or self.parts():
                raise ValueError(f"{place}, which has no {self.run_path.name} beside it: write to another file.")
            return
        try:
            earlier = json.loads(self.run_path.read_text(encoding="utf-8"))
            changed = [name for name in {**self.run, **earlier} if self.run.get(name) != earlier.get(name)]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place}, whose {self.run_path.name} cannot be read: write to another file.") from error
        if changed:
            raise ValueError(
                f"{place} with another {', '.join(changed)}: give the same arguments, or write to another file."
            )

    @property
    def is_complete(self) -> bool:
        """Whether the output is written."""
        return self.path.exists()

    def parts(self) -> list[Path]:
        """The files of all processes, those of earlier ones among them."""
        return [path for path in self.path.parent.iterdir() if path.name.startswith(f"{self.path.name}.part")]

    def done(self) -> dict[int, list[dict]]:
        """The rows of the batches that are done, by the number of the batch."""
        found = {}
        for path in self.parts():
            for text in path.read_bytes().split(b"\n")[:-1]:  # what has no line end was being written
                try:
                    entry = json.loads(text)
                except ValueError:  # as a loss of power leaves behind
                    continue
                if entry["run"] != self.key:
                    raise ValueError(f"`--output` must have no part of another run beside it: remove {str(path)!r}.")
                found[entry["batch"]] = entry["rows"]
        return found

    def claim(self) -> None:
        """Say whose output this will be; of several processes one does so, and before any starts."""
        if not self.run_path.exists():
            write(self.run_path, [json.dumps(self.run, indent=2) + "\n"])

    def start(self) -> None:
        """Make the file of this process ready: what a killed one left in the middle of a line is cut off."""
        with self.part_path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

    def add(self, batch: int, rows: list[dict]) -> None:
        """Keep the rows of a batch."""
        entry = json.dumps({"run": self.key, "batch": batch, "rows": rows}, ensure_ascii=False)
        with self.part_path.open("ab") as file:
            file.write(entry.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, num_batches: int, faults: dict[int, str]) -> list[dict]:
        """Write the output with `faults` for the lines that have no answer, by their numbers; its rows."""
        done = self.done()
        if len(done) != num_batches:
            raise ValueError(
                f"`--output` must be written by one command at a time, and lie in a folder that all its processes "
                f"share, got {len(done)} of {num_batches} batches beside {str(self.path)!r}: run it again."
            )
        rows = [row for batch in done.values() for row in batch]
        rows += [{"line": number, "error": fault} for number, fault in faults.items()]
        rows.sort(key=lambda row: row["line"])
        write(self.path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.remove_parts()
        return rows

    def remove_parts(self) -> None:
        """Remove what is of no use beside the output."""
        for path in self.parts():
            path.unlink()


def write(path: Path, lines: Iterable[str]) -> None:
    """Write a file in one move, so that a kill leaves the old file or the new one."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
