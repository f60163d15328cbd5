"""What the terminal shows of a run: each event in its place."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

OUTPUT = Console(highlight=False)
ERRORS = Console(stderr=True, highlight=False, soft_wrap=True)


def show_error(error: Exception) -> None:
    """Print one error, in full, for a person: no traceback."""
    ERRORS.print(f"[bold red]Error:[/] {escape(str(error))}")


def quieten_libraries() -> None:
    """Keep the libraries' own progress bars and advice out of our output; errors still show."""
    import logging as standard

    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)
    # The reader of GGUF files has a bar of its own, which does not heed that switch.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # type: ignore[attr-defined]


def bytes_text(count: float) -> str:
    """Return a number of bytes as people read it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
