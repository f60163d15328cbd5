"""How a call ends that reads foreign bytes: as it should, with one VeneerError, or wrongly."""

import signal
import traceback
from collections.abc import Callable

from veneer.errors import VeneerError

SECONDS = 5  # of the processor, for one call; an ordinary one takes some hundredths
LONGEST = 25_000  # characters of a message


class TooLong(BaseException):
    """A call has taken SECONDS."""


def stop(*_: object) -> None:
    raise TooLong


def refused_memory(error: BaseException | None) -> bool:
    """Return whether an error was caused, also indirectly, by too little memory."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "allocate" in text or "not enough memory" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def ending(call: Callable[[], object]) -> tuple[str, str | None]:
    """Return how a call ended, and what is wrong with that, if anything is.

    Whoever calls has let SIGPROF be handled by `stop`.
    """
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        call()
    except TooLong:
        return "hang", "".join(traceback.format_exc())
    except VeneerError as error:
        message = str(error)
        wrong = "it asked for all memory" if refused_memory(error) else None
        if len(message) > LONGEST:
            wrong = f"the message has {len(message)} characters"
        return type(error).__name__, wrong
    except Exception:
        return "crash", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "loaded", None
