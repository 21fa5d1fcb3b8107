"""The command line, run in the tests' own process."""

from __future__ import annotations

import sys

import pytest

from subcircuit import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: (exit status, standard output, standard error)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["subcircuit", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command
