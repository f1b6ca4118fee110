"""List, compare, check, promote and remove releases; in a folder or on any storage that fsspec knows."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from pipeline.terminal import print

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Releases = Annotated[str, typer.Argument(help="Folder or URL of releases.")]
Release = Annotated[str, typer.Argument(help="RELEASES/v0002, RELEASES/ALIAS, or RELEASES (then the latest).")]
Alias = Annotated[str, typer.Option(help="Name that is moved.")]
PublicKey = Annotated[
    str,
    typer.Option(help="Ed25519 public key (PEM): the manifest has to be signed by it, and its alias."),
]
SigningKey = Annotated[
    str,
    typer.Option(help="Ed25519 private key (PEM) to sign the alias; the release is signed by it, or PUBLIC_KEY."),
]


def _shown(text: str) -> str:
    """Text of a manifest or a storage, which anybody may have written, without what terminals take for commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@app.command("list")
def list_(releases: Releases) -> None:
    """All versions, oldest first, with the aliases that name them."""
    from pipeline.release.versions import listed

    found = listed(releases)
    if not found:
        raise ValueError(f"{releases}: no releases here")
    for version in found:
        if version.manifest is None:
            what = "damaged; `release verify` says how" if version.is_damaged else "half-written"
            print(f"{version.name:8} {what}; `release gc` removes it when it is a day old")
            continue
        size = sum(entry["size"] for entry in version.manifest["files"].values())
        facts = version.manifest["provenance"]
        created, named = _shown(version.manifest["created"]), " ".join(version.aliases)
        concepts = len(facts.get("concepts", ()))
        print(f"{version.name:8} {created}  {size / 1e6:8.2f} MB  {concepts:4} concepts  {named}".rstrip())


@app.command()
def show(release: Release) -> None:
    """A release's manifest: files with their sums, and where it came from."""
    from pipeline.release.versions import read

    print(json.dumps(read(release), indent=1))


@app.command()
def diff(old: Release, new: Release) -> None:
    """What differs: concepts added, removed and trained anew, measures, base, corpus, settings, packages."""
    from pipeline.release.versions import diff as differences

    print("\n".join(_shown(line) for line in differences(old, new)) or "no difference")


@app.command()
def promote(
    release: Release,
    alias: Alias = "latest",
    public_key: PublicKey = "",
    signing_key: SigningKey = "",
) -> None:
    """Let an alias name a version; or publish RELEASES/candidates/KEY, which the gate refused, after all."""
    from pipeline.release.versions import promote as promote_release

    version = promote_release(release, alias, public_key=public_key, signing_key=signing_key)
    print(f"{alias} is {version}")


@app.command()
def rollback(
    releases: Releases,
    alias: Alias = "latest",
    to: Annotated[str, typer.Option(help="Version, instead of the one before.")] = "",
    public_key: PublicKey = "",
    signing_key: SigningKey = "",
) -> None:
    """Let an alias name the version before the one it names; a retraining leaves it there until something changes."""
    from pipeline.release.versions import rollback as roll_back

    left, version = roll_back(releases, alias, to, public_key=public_key, signing_key=signing_key)
    print(f"{alias} is {version}, was {left}")


@app.command()
def verify(
    release: Release,
    public_key: PublicKey = "",
    project: Annotated[str, typer.Option(help="Name of the batch or retraining that has to have made it.")] = "",
) -> None:
    """Recompute all sums of a release; exit code 1 when a file is missing, changed or extra, or the signature wrong."""
    from pipeline.release.publish import signed_alias
    from pipeline.release.publish import verify as verify_release

    problems = verify_release(release, public_key, project)
    for problem in problems:
        print(_shown(problem), file=sys.stderr)
    print(f"{release}: {'whole, all sums agree' if not problems else f'{len(problems)} problems'}")
    if problems:
        raise typer.Exit(1)
    if public_key and (alias := signed_alias(release)):
        named = f"{alias['alias']}.json names {alias['version']} of the project {alias['project']!r}"
        print(_shown(f"{named}: move number {alias['number']}, at {alias['time']}"))


@app.command()
def gc(
    releases: Releases,
    keep: Annotated[int, typer.Option(min=1, help="Whole versions, and candidates, that stay: the newest.")] = 10,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be removed.")] = False,
) -> None:
    """Remove old versions that no alias names, old candidates, and what was left half-written a day ago."""
    from pipeline.release.versions import gc as remove_old

    removed = remove_old(releases, keep, dry_run=dry_run)
    for name in removed:
        print(f"{'would remove' if dry_run else 'removed'} {name}")
    print(f"{len(removed)} {'to remove' if dry_run else 'removed'}")
