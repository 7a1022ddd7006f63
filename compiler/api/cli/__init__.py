"""The command line ``attnedit``: the library's functions with files for arguments.

Exit codes: 0 success, 2 wrong usage or bad input, 1 the job failed, 130 interrupted. Failure is one line on
stderr; ``ATTNEDIT_DEBUG=1`` adds the traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from attnedit.cli import calibrate, compile, demo, evaluate, export, generate, inspect, sweep
from attnedit.cli.terminal import debugging, fail, quiet_libraries, show
from attnedit.compiler.errors import AttneditError
from attnedit.compiler.formats import own_version
from attnedit.compiler.interrupts import as_usual

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rewrite the attention of a trained language model into one that is cheaper to serve.",
)


def _show_version(asked: bool) -> None:
    if asked:
        show(f"attnedit {own_version()}")
        raise typer.Exit


@app.callback()
def _attnedit(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("inspect")(inspect.inspect)
app.command("compile")(compile.compile_model)
app.command("calibrate")(calibrate.calibrate)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("sweep")(sweep.sweep)
app.command("demo")(demo.demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no exception leaves this function."""
    as_usual()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        with quiet_libraries():
            code = app(args=arguments, prog_name="attnedit", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 130
    except TyperException as error:
        # Commands raise AttneditError, so this is typer's own parsing of the arguments.
        code = fail(f"{error.format_message()} (attnedit --help shows the usage)", error.exit_code, as_json=as_json)
    except AttneditError as error:
        code = fail(str(error), error.exit_code, as_json=as_json)
        if debugging():
            traceback.print_exc()
    except Exception as error:  # the boundary: whatever was not foreseen is reported in one line too
        hint = "" if debugging() else "; set ATTNEDIT_DEBUG=1 for the traceback"
        code = fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, as_json=as_json)
        if debugging():
            traceback.print_exc()
    if code == 130:
        fail("interrupted", 130, as_json=as_json)
    return code if isinstance(code, int) else 0
