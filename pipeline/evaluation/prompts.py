"""Prompt suites: plain text files, a prompt a line, `{}` standing for the concept; the form of the authors' 101-concept
benchmark (github: adobe-research/custom-diffusion, `customconcept101/prompts`), whose suites of two concepts have `{0}`
and `{1}`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.reading import check_visible, read_lines, shown

PLACES = ("{}",)
TWO_PLACES = ("{0}", "{1}")


def check_prompt(prompt: str, places: Sequence[str] = PLACES) -> str:
    """The prompt, if it names each concept once, and can be shown. Raises ValueError otherwise."""
    rest = check_visible(prompt)
    for place in places:
        rest = rest.replace(place, "", 1)
    if any(prompt.count(place) != 1 for place in places) or "{" in rest or "}" in rest:
        example = "photo of a {}" if len(places) == 1 else "photo of a {0} and a {1}"
        raise ValueError(
            f"a prompt names the concept once by {' and '.join(map(repr, places))}, as in {example!r}; found "
            f"{shown(prompt)}"
        )
    return prompt


def read_prompts(path: Path, places: Sequence[str] = PLACES) -> tuple[str, ...]:
    """Read a prompt suite; empty lines do not count.

    Args:
        places: what stands for the concepts: `PLACES`, or `TWO_PLACES` for a suite of two concepts.

    Raises:
        ValueError: naming the file and the line.
    """
    prompts = []
    for number, line in read_lines(path, "file of prompts, one a line"):
        try:
            prompts.append(check_prompt(line, places))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return tuple(prompts)
