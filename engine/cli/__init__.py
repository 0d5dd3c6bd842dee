"""The `hearth` command."""

from engine.cli.app import app


def main() -> None:
    """Entry point of the console script."""
    app()
