"""The `vidsparse` command: the composition root, and the only part of vidsparse that knows the pipelines package.

Nothing here imports torch or diffusers until a command really needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from vidsparse.errors import VidsparseError

OK, BUG, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
OTHERS_WAIT_S = 3.0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 a bug of ours, 2 bad input, 130 interrupted."""
    import typer

    from .app import app
    from .arguments import normalise

    arguments = normalise(sys.argv[1:] if argv is None else argv)
    # Of the processes of torchrun only the first has files to remove; the others wait for it where no handler runs.
    previous = _exit_on_sigterm() if is_first() else None
    try:
        code = app(arguments, prog_name="vidsparse", standalone_mode=False, obj=arguments)
    except VidsparseError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted; nothing was left half written.", INTERRUPTED)
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        return BUG
    except Exception as error:
        # The command line library raises its own kinds of error (unknown option, missing value).
        if hasattr(error, "format_message"):
            return _fail(str(error.format_message()).replace("\n", " "))  # pyright: ignore[reportAttributeAccessIssue]
        return _bug(error, verbose="--verbose" in arguments)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    return code if isinstance(code, int) else OK


def _exit_on_sigterm() -> Any:
    """Let SIGTERM unwind like an exception, so that temporary files are removed. Returns the handler to restore."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        return None


def is_first() -> bool:
    """Whether this is the process that prints; of several that torchrun started only one is."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _fail(sentence: str, code: int = BAD_INPUT) -> int:
    if not is_first():
        # Nearly always the first process says the same; then torchrun ends this one before it speaks.
        time.sleep(OTHERS_WAIT_S)
    print(f"vidsparse: {sentence}", file=sys.stderr)
    return code


def _bug(error: Exception, verbose: bool) -> int:
    if verbose:
        import traceback

        traceback.print_exception(error)
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    hint = "please report it with the traceback above" if verbose else "run again with --verbose for the traceback"
    return _fail(f"Unexpected error ({what}). This is a bug; {hint}.", BUG)
