"""TensorBoard: one packed event a log step, through the logger's own writer."""

from __future__ import annotations

try:
    from ._sink import TensorBoardSink
except ModuleNotFoundError as error:
    if error.name and error.name.split(".")[0] == "tensorboard":
        raise ModuleNotFoundError(
            "TensorBoardSink needs the package tensorboard: pip install 'gradwatch[tensorboard]'", name=error.name
        ) from error
    raise

__all__ = ["TensorBoardSink"]
