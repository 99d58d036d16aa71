"""The command ``lowbit``, and ``python -m lowbit``."""

import gc
import sys


def main() -> None:
    """Runs the command line. Ctrl-C ends it in a line from the first moment on, when its modules are still being imported."""
    try:
        from lowbit.cli import app

        app(prog_name="lowbit")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        gc.freeze()  # the end of Python searches what is not frozen for cycles: over a second after torch and transformers


if __name__ == "__main__":
    main()
