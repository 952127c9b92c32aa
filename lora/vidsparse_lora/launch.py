"""The command line of the training scripts, for `accelerate launch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidsparse.cli import is_first
from vidsparse.errors import VidsparseError
from vidsparse_lora.config import load_config


def main(config_class: Any, train: Callable[[Any], Path], description: str | None) -> None:
    """Read `--config` and `--set`, train, print the adapter's path; bad input gives one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings")
    arguments = parser.parse_args()
    try:
        path = train(load_config(config_class, arguments.config, arguments.set))
    except VidsparseError as error:
        print(f"vidsparse: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if is_first():
        print(path)
