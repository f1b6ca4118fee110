"""The merged model of a published release, where the store has not what it was made of."""

from __future__ import annotations

from dataclasses import dataclass

import fsspec

from pipeline.stages.merge import MergedFiles
from pipeline.stages.stage import Context, Stage
from pipeline.store import file_digest


@dataclass(frozen=True, kw_only=True)
class Released(Stage[MergedFiles]):
    kind, version, artifact = "released", 1, MergedFiles

    @dataclass(frozen=True)
    class Places:
        release: str

    sha256: str
    """Of the file."""
    places: Places

    def run(self, context: Context) -> None:
        place, file = self.places.release, MergedFiles(context.out).file
        fs, root = fsspec.core.url_to_fs(f"{place}/{file.name}")
        fs.get_file(root, str(file))
        if file_digest(file) != self.sha256:
            raise ValueError(f"{place}: {file.name} is not what its manifest says; `polyconcept release verify` it")
