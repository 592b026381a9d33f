"""How tests wait."""

import time


def until(condition, what, seconds=45):
    """Wait until something is so, for as long as a loaded machine may need."""
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, f"waited in vain for {what}"
        time.sleep(0.01)
    return found
