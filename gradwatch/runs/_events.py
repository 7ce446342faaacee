"""Scalars of TensorBoard event files."""

from __future__ import annotations

from pathlib import Path

from ..errors import RunFormatError

__all__ = ["event_run", "read_events"]


def event_run(path: Path) -> Path:
    """Return the event file, or the one directory at or below `path` that holds event files.

    Raises:
        RunFormatError: there is none, or there are several.
    """
    if path.is_file():
        return path
    if any(path.glob("*tfevents*")):
        return path
    found = sorted({file.parent for file in path.rglob("*tfevents*") if file.is_file()})
    # Our own sub-run of a log directory holds a layout, and no scalars.
    found = [f for f in found if f.parent not in found]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RunFormatError(f"{path} holds neither event files nor is it a CSV file.")
    names = ", ".join(str(f.relative_to(path)) for f in found[:8])
    raise RunFormatError(
        f"{path} holds {len(found)} runs; give one of them: {names}{', ...' if len(found) > 8 else ''}."
    )


def read_events(path: Path) -> dict[str, dict[int, float]]:
    """Return every scalar, tag -> step -> value. Where a step was written twice, the later one holds.

    Raises:
        RunFormatError: tensorboard is not installed, or the file is none.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ModuleNotFoundError:
        raise RunFormatError(
            f"{path}: reading event files needs the package tensorboard: pip install 'gradwatch[tensorboard]'."
        ) from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "histograms": 1, "images": 1})
    try:
        events.Reload()
    except Exception as error:
        raise RunFormatError(f"{path} can't be read as event files: {type(error).__name__}: {error}.") from None
    series = {tag: {e.step: float(e.value) for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            series[tag] = {e.step: float(make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)}
    return series
