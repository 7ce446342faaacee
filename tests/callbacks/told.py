"""A function to name as `tests.callbacks.told:hear`."""

HEARD = []


def hear(incident):
    HEARD.append(incident)
