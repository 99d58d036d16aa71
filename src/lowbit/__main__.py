"""``python -m lowbit`` is the command ``lowbit``."""

from lowbit.cli import app

if __name__ == "__main__":
    app(prog_name="lowbit")
