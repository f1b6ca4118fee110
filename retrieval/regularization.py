"""Sets of regularisation images with their captions, retrieved or generated, as webdataset shards on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander


@dataclass(frozen=True)
class RegularizationSet:
    """A directory of shards (`00000.tar`, …) and `set.json`; of a retrieved set also `samples.parquet` with every
    candidate's fate."""

    path: Path
    asked: int
    """Images wanted."""
    got: int
    """Images there are."""
    statuses: dict[str, int]
    """How many candidates ended how, see `retrieval.download.download`; of a generated set how many were `drawn`."""
    shortfall: str | None
    """Why there are fewer than asked, or None."""

    @classmethod
    def generated(cls, path: Path, images: Iterable[Image.Image], caption: str) -> RegularizationSet:
        """Write a set of images that a model drew for one caption, as the one shard of a folder that is made."""
        path.mkdir(parents=True)
        count = 0
        with TarWriter(str(path / "00000.tar"), mtime=0) as shard:
            for image in images:
                encoded = io.BytesIO()
                image.save(encoded, "jpeg", quality=95)
                shard.write({"__key__": f"{count:09d}", "jpg": encoded.getvalue(), "txt": caption.encode()})
                count += 1
        made = cls(path, asked=count, got=count, statuses={"drawn": count}, shortfall=None)
        made.save()
        return made

    @classmethod
    def load(cls, path: Path | str) -> RegularizationSet:
        """Open a set; ValueError when there is none."""
        path = Path(path)
        if not (path / "set.json").is_file():
            raise ValueError(f"{path} is not a regularisation set: it has no set.json")
        return cls(path=path, **json.loads((path / "set.json").read_text()))

    def save(self) -> None:
        """Write `set.json`."""
        facts = {name: value for name, value in asdict(self).items() if name != "path"}
        (self.path / "set.json").write_text(json.dumps(facts, indent=2) + "\n")

    def __len__(self) -> int:
        return self.got

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        """Yield (RGB image, caption), in the same order each time: nearest caption first."""
        for sample in self.samples():
            yield own_image(sample["jpg"]), sample["txt"].decode()

    def captions(self) -> list[str]:
        """List the captions in the order of the images."""
        return [sample["txt"].decode() for sample in self.samples()]

    def samples(self) -> Iterator[dict]:
        """Yield the shards' samples undecoded: `__key__`, and bytes as `jpg`, `txt`, `json`."""
        for shard in sorted(self.path.glob("*.tar")):
            yield from read_shard(shard)


def own_image(jpg: bytes) -> Image.Image:
    """An image of a set, as RGB: a JPEG that was written here."""
    return Image.open(io.BytesIO(jpg), formats=("JPEG",)).convert("RGB")


def read_shard(shard: Path) -> Iterator[dict]:
    """Read one webdataset shard as bytes.

    By webdataset's tar reader alone: its `decode` would unpickle members that end in .pyd, and its `WebDataset`
    would take a path with `{..}` for several and one that begins with `pipe:` for a command.
    """
    with shard.open("rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}]))
