"""Warnings are errors in this suite; gradwatch's own then go to its logger, where they must not pass unseen."""

import logging

import pytest


class _Unheard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        if record.module == "_warn" and record.funcName == "warn":
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def unheard():
    """A warning of gradwatch's that a test did not expect (`pytest.warns`) fails it, unless it empties this list."""
    handler, logger = _Unheard(), logging.getLogger("gradwatch")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    assert not handler.messages, handler.messages
