"""The ``dualstream`` command."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    raise SystemExit("not built yet")
