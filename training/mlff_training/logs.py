"""Where training reports: a progress bar, CSV always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlff_engines.errors import ConfigError
from mlff_engines.files import replacing


class TrainingLog:
    """Reports of one run in `folder`; silent when `active` is false (all processes but the first).

    Raises:
        ConfigError: TensorBoard or Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, *, active: bool, tensorboard: bool, wandb_project: str | None) -> None:
        self.active = active
        self.path = folder / "log.csv"
        self._console = Console(stderr=True, quiet=not active)
        self._progress: Progress | None = None
        self._use_tensorboard = tensorboard
        self._tensorboard: Any = None
        self._wandb: Any = None
        for package, key, value in (
            ("tensorboard", "tensorboard", tensorboard or None),
            ("wandb", "wandb_project", wandb_project),
        ):
            if value is not None and importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"train.{key} is {value!r} but {package} is not installed: pip install {package}, "
                    f"or set train.{key}: {'false' if value is True else 'null'}"
                )
        if active and wandb_project is not None:
            import wandb

            folder.mkdir(parents=True, exist_ok=True)
            self._wandb = wandb.init(project=wandb_project, dir=folder, name=folder.name, resume="allow")

    def say(self, message: str) -> None:
        """One line to the terminal."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """A progress bar over `total` batches while the body runs; what is open is closed afterwards."""
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        )
        try:
            with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
                progress.add_task("train", total=total, completed=done, state="")
                self._progress = progress
                yield
        finally:
            self._progress = None
            if self._tensorboard is not None:
                self._tensorboard.close()
                self._tensorboard = None
            if self._wandb is not None:
                self._wandb.finish()

    def advance(self) -> None:
        """One batch more."""
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])

    def forget_after(self, epoch: int) -> None:
        """Drop rows later than `epoch`, and one cut off by a kill: a resumed run writes them again."""
        if not self.active or not self.path.exists():
            return
        columns, rows = self._read()
        kept = [row for row in rows if None not in row.values() and int(row["epoch"]) <= epoch]
        self._write(columns if kept else [], kept)

    def row(self, values: Mapping[str, float]) -> None:
        """One validation; `values` begins with `epoch` and `step`."""
        if not self.active:
            return
        with self.path.open("a+", newline="") as file:
            file.seek(0)
            columns = next(csv.reader(file), [])
        if not set(values) <= set(columns):  # a new file, or a resumed run with another loss
            self._write([*columns, *(name for name in values if name not in columns)], self._read()[1])
            columns, _ = self._read()
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerow({name: f"{value:.8g}" for name, value in values.items()})
        self._publish(values)
        state = f"epoch {values['epoch']:.0f}, forces {1e3 * values['valid_forces_mae']:.1f} meV/Å"
        if self._progress is not None and self._console.is_terminal:
            self._progress.update(self._progress.task_ids[0], state=state)
        else:
            self.say(f"{state}, {values['seconds']:.0f} s")

    def _publish(self, values: Mapping[str, float]) -> None:
        step = int(values["step"])
        if self._use_tensorboard:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                # points that a killed run wrote after its last saved state are hidden
                self._tensorboard = SummaryWriter(self.path.parent / "tensorboard", purge_step=step)
            for name, value in values.items():
                self._tensorboard.add_scalar(name.replace("_", "/", 1), value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Columns and rows of the CSV file; None stands where a row was cut off."""
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return list(reader.fieldnames or []), rows

    def _write(self, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            if columns:
                writer.writeheader()
            writer.writerows(rows)
