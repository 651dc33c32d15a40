"""The arguments of the commands; what a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rpqfx.errors import RPQError

FAILED = 2  # the exit status of a command that could not do what it was asked for; of a wrong call as well
_HERE = "rpqfx.integrations.command_line"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the process.

        Args:
            message: What was wrong.
        """
        self.exit(FAILED, f"{self.prog}: {_one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What was typed after the program's name; ``sys.argv[1:]`` if left out.

    Returns:
        The exit status.
    """
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
        sys.stdout.flush()
        return status
    except (RPQError, OSError, ImportError, ValueError) as error:
        if isinstance(error, BrokenPipeError):  # who reads the output has had enough
            sys.stderr.close()
            return FAILED
        print(f"rpqfx {given.command}: {_one_line(str(error)) or type(error).__name__}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"rpqfx {given.command}: interrupted", file=sys.stderr)
        return 130


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _command(module: str) -> Callable[[argparse.Namespace], int]:
    """Runs a command and prints what it returns: the text, or with ``--json`` the values."""

    def run(given: argparse.Namespace) -> int:
        values, text = importlib.import_module(f"{_HERE}.{module}").run(given)
        print(json.dumps(values) if given.json else text)
        return 0

    return run


def _kernels(given: argparse.Namespace) -> int:
    return int(importlib.import_module(f"{_HERE}.kernels").run())


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least} on, got {text!r}")
        return value

    return read


def _bits(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 16:
        raise argparse.ArgumentTypeError(f"a number of bits above 0 and at most 16, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("rpqfx", description="Models whose weights live in codebooks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, does: str) -> Any:
        added = commands.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        added.set_defaults(run=_command(name))
        added.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return added

    _add_convert(add("convert", "quantize the weights of a folder of transformers"))
    shows = add("report", "show what is quantized in a file or folder, and what was left alone and why")
    shows.add_argument("path", metavar="PATH", help="file of rpqfx.save, or folder of save_pretrained")
    shows.add_argument("--html", type=Path, metavar="FILE", help="write the report to a page, too")
    checks = add("check", "verify the seal, every range and the checksum of a file or folder; no model is built")
    checks.add_argument("path", metavar="PATH", help="file of rpqfx.save, or folder of save_pretrained")
    _add_generate(add("generate", "go on with a text"))
    _add_bench(add("bench", "measure tokens a second and memory"))
    kernels = commands.add_parser("kernels", help="compile the CPU kernels now, not when they are first used")
    kernels.set_defaults(run=_kernels)
    return parser


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("folder", metavar="FOLDER", help="dense model, as save_pretrained writes it")
    convert.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the result goes")
    convert.add_argument(
        "--bits-per-weight", type=_bits, required=True, help="bits a weight, all that is stored counted"
    )
    convert.add_argument(
        "--embedding-bits", type=_bits, default=8.5, help="bits a weight of embeddings and heads (%(default)s)"
    )
    convert.add_argument(
        "--calibration", type=Path, metavar="PATH", help="text, JSON lines with a key 'text', or a folder of images"
    )
    convert.add_argument("--held-back", type=Path, metavar="PATH", help="text for the perplexity; else the end of it")
    convert.add_argument("--batches", type=_whole(1), help="batches of calibration (16)")
    convert.add_argument("--length", type=_whole(2), help="tokens of a batch, at most (1024)")
    convert.add_argument("--evaluate", type=_whole(2), help="tokens that are held back, at most (8192)")
    convert.add_argument("--dtype", default="auto", help="of the dense model (%(default)s: as it was saved)")
    convert.add_argument("--seed", type=_whole(0), default=0, help="of the fits (%(default)s)")
    convert.add_argument("--quiet", action="store_true", help="show no progress")


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("path", metavar="PATH", help="folder of save_pretrained")
    generate.add_argument("--prompt", required=True, help="the text")
    generate.add_argument("--tokens", type=_whole(1), default=64, help="new tokens, at most (%(default)s)")
    generate.add_argument("--sample", action="store_true", help="draw tokens; else the likeliest is taken")
    generate.add_argument("--seed", type=_whole(0), default=0, help="of the draws (%(default)s)")
    generate.add_argument("--tokenizer", metavar="FOLDER", help="of the tokenizer; the model's if left out")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("path", metavar="PATH", help="folder of save_pretrained")
    bench.add_argument("--dense", metavar="FOLDER", help="dense model, measured beside it")
    bench.add_argument("--tokens", type=_whole(1), default=32, help="single tokens that are timed (%(default)s)")
    bench.add_argument("--prompt-tokens", type=_whole(1), default=64, help="tokens before them (%(default)s)")
