"""The `polyconcept` command, in this process."""

from __future__ import annotations

from ray_jobs import cli


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, in which there is never a traceback."""
    try:
        cli.main(list(arguments))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err, err
    return code, out, err
