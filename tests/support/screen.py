"""A terminal whose text a test reads."""

import io


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True
