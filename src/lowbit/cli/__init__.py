"""The command line, one file a command. ``app`` is the entry point.

What every command keeps: results on stdout and everything else on stderr, so that ``--json`` is JSON alone; exit code 0
only on success, 1 with one line that says what is wrong and what to do, 2 for a command that is not well formed, 130
after Ctrl-C, 143 after SIGTERM. Commands import what they run when they run it, so that help, lists and completion need no torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lowbit.cli import (
    allocate,
    bench,
    cache,
    chat,
    common,
    compare,
    evaluate,
    explain,
    export,
    generate,
    generate_data,
    imatrix,
    import_,
    inspect,
    merge_adapter,
    methods,
    plan,
    quantize,
    recipes,
    recommend,
    report,
    serve,
    train,
)


class _Flags:
    """Flags that are off when they are not given. typer leaves its own (--help, --show-completion) None, and imports
    pydantic to make sure that None is no mistake: a quarter of the time of a help page."""

    def get_params(self, ctx: typer.Context) -> list[Any]:
        params = super().get_params(ctx)  # pyright: ignore[reportAttributeAccessIssue]
        for param in params:
            if getattr(param, "is_flag", False) and param.default is None:
                param.default = False
        return params


class _Group(_Flags, TyperGroup):
    pass


_ALIASES = {"--nsamples": "--samples", "--seqlen": "--seq-len", "--wbits": "--bits", "--groupsize": "--group-size"}
"""Names that other tools give to options. They work and stay out of the help."""


class _Command(_Flags, TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for param in self.get_params(ctx) for name in param.opts}
        named = [word.partition("=") for word in args]
        renamed = [
            (_ALIASES[name] if _ALIASES.get(name) in known else name, equals, value) for name, equals, value in named
        ]
        rest = super().parse_args(ctx, ["".join(word) for word in renamed])
        for name, value in ctx.params.items():
            # nan compares false with every limit, so no check of a range would see it
            if isinstance(value, float) and math.isnan(value):
                raise typer.BadParameter("expected a number, found nan", param_hint=f"--{name.replace('_', '-')}")
        return rest


_EPILOG = """
Example: lowbit quantize smollm2-135m --method gptq --bits 4 --group-size 64 -o smollm2-w4

Environment: LOWBIT_CACHE is the directory of converted GGUF files. LOWBIT_DEBUG=1 shows tracebacks, as --verbose does.
LOWBIT_KERNELS names the kernel that every packed layer must use; reference also keeps fits and solvers in torch. HF_HOME is
the hub's cache; HF_HUB_OFFLINE=1 reads only that. OMP_NUM_THREADS limits threads, as --threads does.
"""

app = typer.Typer(
    name="lowbit",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",  # the only mode that joins the lines of a paragraph
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _version(asked: bool) -> None:
    if asked:
        from lowbit import __version__

        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Quantize large language models, run them packed, and measure what it cost."""
    common.set_output(quiet, verbose)


for module in (
    quantize,
    train,
    evaluate,
    compare,
    allocate,
    export,
    import_,
    merge_adapter,
    generate,
    generate_data,
    imatrix,
    chat,
    serve,
    plan,
    explain,
    methods,
    recipes,
    inspect,
    report,
    recommend,
    bench,
    cache,
):
    command = common.guarded(module.command, getattr(module, "INTERRUPTED", "interrupted"))
    app.command(module.__name__.rpartition(".")[2].strip("_").replace("_", "-"), cls=_Command, epilog=module.EXAMPLE)(
        command
    )

__all__ = ["app"]
