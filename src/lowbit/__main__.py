"""The command ``lowbit``, and ``python -m lowbit``."""

import gc
import os
import sys

SPINS = "10000"
"""How often a thread of OpenMP looks whether the others are done before it sleeps. The usual 300,000 take the core from the thread
that is waited for, where other work runs too: on 2 cores beside one busy process GPTQ took 2.5 to 3.7 times as long as alone, and 1.9
times as long with this; alone it took the same."""


def main() -> None:
    """Runs the command line. Ctrl-C ends it in a line from the first moment on, when its modules are still being imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
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
