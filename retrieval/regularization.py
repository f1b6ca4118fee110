"""Sets of regularisation images with their captions, retrieved or generated, as webdataset shards on disk."""

from __future__ import annotations

import io
import json
import tarfile
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
        for shard, sample in self._samples():
            try:
                image = own_image(sample["jpg"])
            except OSError as error:
                raise _damaged(shard, sample, f"its image cannot be read: {error}") from None
            yield image, _caption(shard, sample)

    def captions(self) -> list[str]:
        """List the captions in the order of the images."""
        return [_caption(shard, sample) for shard, sample in self._samples()]

    def samples(self) -> Iterator[dict]:
        """Yield the shards' samples undecoded: `__key__`, and bytes as `jpg`, `txt`, `json`.

        Raises: ValueError for a shard that is damaged.
        """
        return (sample for _, sample in self._samples())

    def _samples(self) -> Iterator[tuple[Path, dict]]:
        for shard in sorted(self.path.glob("*.tar")):
            for sample in read_shard(shard):
                if not {"jpg", "txt"} <= set(sample):
                    raise _damaged(shard, sample, "an image and its caption are needed")
                yield shard, sample


def _caption(shard: Path, sample: dict) -> str:
    try:
        return sample["txt"].decode()
    except UnicodeDecodeError as error:
        raise _damaged(shard, sample, f"its caption is not UTF-8: {error.reason}") from None


def _damaged(shard: Path, sample: dict, why: str) -> ValueError:
    return ValueError(f"{shard}: sample {sample['__key__']!r}: {why}; remove this set from the store to make it anew")


def own_image(jpg: bytes) -> Image.Image:
    """An image of a set, as RGB: a JPEG that was written here."""
    return Image.open(io.BytesIO(jpg), formats=("JPEG",)).convert("RGB")


def read_shard(shard: Path) -> Iterator[dict]:
    """Read one webdataset shard as bytes.

    By webdataset's tar reader alone: its `decode` would unpickle members that end in .pyd, and its `WebDataset`
    would take a path with `{..}` for several and one that begins with `pipe:` for a command.
    Raises: ValueError when it is no whole archive.
    """
    with shard.open("rb") as stream:
        try:
            yield from group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}]))
        except tarfile.TarError as error:
            raise ValueError(f"{shard}: no whole archive: {error.args[0]}") from None
