"""TensorBoard event files, as programs of others write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from gradwatch.runs import read_log

from ..kind import Kind, Reading


class EventFiles(Kind):
    name = "event-files"

    def make(self, folder: Path) -> None:
        with (folder / "events.out.tfevents.1700000000.host").open("wb") as file:
            writer = RecordWriter(file)
            writer.write(Event(wall_time=1.7e9, file_version="brain.Event:2").SerializeToString())
            for step in range(40):
                values = [
                    Summary.Value(tag=tag, simple_value=number)
                    for tag, number in (("train/loss", 1.0 / (step + 1)), ("grad_norm", 1.0 + step % 3))
                ]
                event = Event(wall_time=1.7e9 + step, step=step, summary=Summary(value=values))
                writer.write(event.SerializeToString())
            writer.flush()

    def damage(self, folder: Path, rng: np.random.Generator) -> str:
        """A file that ends behind a whole record is a sound one of a shorter run: nothing in it could tell."""
        (file,) = folder.iterdir()
        sound = file.read_bytes()
        while True:
            said = super().damage(folder, rng)
            left = file.read_bytes() if file.exists() else b""
            if not (sound.startswith(left) and _ends_whole(left)):
                return said
            file.write_bytes(sound)

    def read(self, folder: Path) -> Reading:
        log = read_log(folder)
        return Reading({("loss", step) for step in log.scalar("loss")[0].tolist()})


def _ends_whole(data: bytes) -> bool:
    """Return whether a file ends behind a record: length, checksum, data, checksum."""
    place = 0
    while place < len(data):
        place += 16 + int.from_bytes(data[place : place + 8], "little")
    return place == len(data)
