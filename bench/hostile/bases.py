"""Base models: folders with parts missing, pointers in place of files, other models, foreign code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.case import Case, Check, accepted, words, write
from hostile.common import CLIP, MODEL, Pickled, batch_text, planned

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 3438167536\n"
UNET, ENCODER, VAE = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


def base(
    name: str,
    spoil: Callable[[Path], Any] = lambda _: None,
    *,
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    written: str = "./mybase",
    loads: bool = False,
) -> Case:
    """A copy of the miniature, spoilt, as the base of a batch. loads: it is to be loaded, too, as a training does."""

    def give():
        shutil.copytree(MODEL, "mybase")
        spoil(Path("mybase"))
        clip = f"evaluation: {{clip: {CLIP}}}"
        write(**{"batch.yaml": batch_text(f"base: {written}").replace("evaluation: {}", clip)})

        def used():
            plan = planned()
            if loads or right is accepted:
                from training.backbone import load_backbone

                load_backbone(plan.batch.base_path)
            return plan

        return used

    return Case(name, give, words(refused), right)


def gone(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            place = folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()

    return spoil


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: write(**{str(folder / name): content})


def config(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        described = json.loads((folder / name).read_text())
        described |= changes
        (folder / name).write_text(json.dumps({k: v for k, v in described.items() if v is not ...}))

    return spoil


def renamed(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for old, new in pairs:
            (folder / old).rename(folder / new)

    return spoil


def _cut(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate((folder / name).stat().st_size // 2)

    return spoil


def _bins(folder: Path) -> None:
    for name in (UNET, ENCODER, VAE):
        (folder / name).unlink()
        new = (folder / name).with_name("pytorch_model.bin" if "text" in name else "diffusion_pytorch_model.bin")
        new.write_bytes(pickle.dumps(Pickled()))


def _sharded(folder: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": {
            "conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors",
            "conv_in.bias": "diffusion_pytorch_model-00002-of-00002.safetensors",
        },
    }
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    write(**{str(folder / "unet/diffusion_pytorch_model.safetensors.index.json"): json.dumps(index)})


def _code(folder: Path) -> None:
    """A tokenizer, a text encoder and a pipeline that are code in the folder."""
    code = "import os\nos.system('touch executed')\nclass Mine: pass\n"
    write(
        **{
            str(folder / name): code
            for name in ("pipeline.py", "tokenizer/mine.py", "text_encoder/mine.py", "unet/mine.py")
        }
    )
    for name in ("tokenizer/tokenizer_config.json", "text_encoder/config.json"):
        config(
            name,
            auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"], "AutoModel": "mine.Mine", "AutoConfig": "mine.Mine"},
        )(folder)


def _asks_for_code(folder: Path) -> None:
    _code(folder)
    config("tokenizer/tokenizer_config.json", tokenizer_class="Mine")(folder)


def _slow_tokenizer(folder: Path) -> None:
    """As old releases have it: the merge table as text."""
    described = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in described["merges"]]
    write(
        **{
            str(folder / "tokenizer/vocab.json"): json.dumps(described["vocab"]),
            str(folder / "tokenizer/merges.txt"): "#version: 0.2\n" + "\n".join(merges) + "\n",
        }
    )
    (folder / "tokenizer/tokenizer.json").unlink()


def _half_precision(folder: Path) -> None:
    renamed(*((n, n.replace(".safetensors", ".fp16.safetensors")) for n in (UNET, ENCODER, VAE)))(folder)


def _elsewhere(folder: Path) -> None:
    folder.rename("../home/mybase")


MODEL_INDEX = "model_index.json"
UNET_CONFIG = "unet/config.json"
CASES = [
    base("whole", right=accepted),
    base("with a slash behind it", written="mybase/", right=accepted),
    base("in ~", _elsewhere, written="~/mybase", right=accepted),
    base("a link to it", lambda f: (f.rename("real"), os.symlink("real", "mybase")), right=accepted),
    base("fp16 variants only", _half_precision, right=accepted),
    base(
        "fp16 variants beside whole ones",
        lambda f: shutil.copy(f / UNET, f / UNET.replace(".safetensors", ".fp16.safetensors")),
        right=accepted,
    ),
    base("a tokenizer as old releases have it", _slow_tokenizer, right=accepted),
    base("a safety checker that is not there", config(MODEL_INDEX, safety_checker=[None, None]), right=accepted),
    base("pickles only", _bins, refused=(".bin|safetensors", "unet|text_encoder|vae")),
    *(
        base(f"no {part}", gone(part), refused=part)
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    ),
    *(
        base(f"no {name}", gone(name), refused=name.split("/")[0])
        for name in (UNET, ENCODER, VAE, UNET_CONFIG, "vae/config.json", "text_encoder/config.json")
    ),
    base("no model_index.json", gone(MODEL_INDEX), refused=("mybase", MODEL_INDEX)),
    *(base(f"a Git LFS pointer as {name}", put(name, POINTER), refused=name) for name in (UNET, ENCODER, VAE)),
    base("a Git LFS pointer as a configuration", put(UNET_CONFIG, POINTER), refused=UNET_CONFIG),
    base("a Git LFS pointer as tokenizer", put("tokenizer/tokenizer.json", POINTER), refused="tokenizer"),
    base("weights cut off", _cut(UNET), refused=UNET),
    base("empty weights", put(UNET, b""), refused=UNET),
    base("weights that are text", put(UNET, "hello"), refused=UNET),
    base("weights with a header of 2^60 bytes", put(UNET, (2**60).to_bytes(8, "little") + b"{"), refused=UNET),
    base("weights that are a FIFO", lambda f: ((f / UNET).unlink(), os.mkfifo(f / UNET)), refused="unet"),
    base(
        "weights that are a link to nothing",
        lambda f: ((f / UNET).unlink(), os.symlink("/gone", f / UNET)),
        refused="unet",
    ),
    base("a text encoder's weights in the UNet's place", lambda f: shutil.copy(f / ENCODER, f / UNET), refused="unet"),
    base("shards of which one is missing", _sharded, refused="00002-of-00002"),
    base("a model_index.json that is none", put(MODEL_INDEX, "{"), refused=MODEL_INDEX),
    base("a model_index.json that is a list", put(MODEL_INDEX, "[]"), refused=MODEL_INDEX),
    base("a model_index.json that is nested", put(MODEL_INDEX, "[" * 100_000), refused=MODEL_INDEX),
    base(
        "a model_index.json with a byte order mark",
        lambda f: put(MODEL_INDEX, "\ufeff" + (f / MODEL_INDEX).read_text())(f),
        refused=MODEL_INDEX,
        right=accepted,
    ),
    base("an empty model_index.json", put(MODEL_INDEX, "{}"), refused=MODEL_INDEX),
    base("another kind of pipeline", config(MODEL_INDEX, _class_name="DiTPipeline"), refused="DiTPipeline"),
    base("an unknown kind of pipeline", config(MODEL_INDEX, _class_name="NoSuchPipeline"), refused="NoSuchPipeline"),
    base("a pipeline without a name", config(MODEL_INDEX, _class_name=...), refused=MODEL_INDEX),
    base("a UNet of an unknown class", config(MODEL_INDEX, unet=["diffusers", "NoSuchModel"]), refused="NoSuchModel"),
    base("a UNet from any module", config(MODEL_INDEX, unet=["os", "system"]), refused="os|unet"),
    base("a configuration that is none", put(UNET_CONFIG, "{"), refused=UNET_CONFIG),
    base("a configuration that is a list", put(UNET_CONFIG, "[]"), refused=UNET_CONFIG),
    base("a configuration in Latin-1", put(UNET_CONFIG, b'{"a": "\xe4"}'), refused=UNET_CONFIG),
    base("a VAE's configuration that is empty", put("vae/config.json", "{}"), refused="vae|autoencoder"),
    base("no sample_size", config(UNET_CONFIG, sample_size=...), refused=("unet", "sample_size")),
    base("a sample_size that is a word", config(UNET_CONFIG, sample_size="8"), refused=("unet", "sample_size")),
    base("a sample_size of zero", config(UNET_CONFIG, sample_size=0), refused=("unet", "sample_size")),
    base("a sample_size of 10^9", config(UNET_CONFIG, sample_size=10**9), refused=("unet", "sample_size")),
    base("an inpainting model", config(UNET_CONFIG, in_channels=9), refused=("9", "channel|inpaint")),
    base("an image-to-image model", config(UNET_CONFIG, in_channels=8), refused=("8", "channel")),
    base(
        "a UNet for another text encoder",
        config(UNET_CONFIG, cross_attention_dim=2048),
        refused="cross_attention_dim|2048|unet",
    ),
    base(
        "a UNet with widths by block",
        config(UNET_CONFIG, cross_attention_dim=[32, 64]),
        refused="cross_attention_dim|unet",
    ),
    base("a UNet of a million layers", config(UNET_CONFIG, layers_per_block=1_000_000), refused="unet"),
    base("block kinds that are unknown", config(UNET_CONFIG, down_block_types=["NoSuchBlock"]), refused="unet"),
    base(
        "a scheduler that predicts the sample",
        config("scheduler/scheduler_config.json", prediction_type="sample"),
        refused="prediction_type|sample",
    ),
    base(
        "a scheduler with no training steps",
        config("scheduler/scheduler_config.json", num_train_timesteps=0),
        refused="num_train_timesteps|schedule",
    ),
    base(
        "a T5 as text encoder",
        config("text_encoder/config.json", model_type="t5", architectures=["T5EncoderModel"]),
        refused="text_encoder|T5",
    ),
    base("a tokenizer that is none", put("tokenizer/tokenizer.json", "{}"), refused="tokenizer"),
    base("a tokenizer that is bytes", put("tokenizer/tokenizer.json", bytes(range(256))), refused="tokenizer"),
    base(
        "a tokenizer of any length",
        config("tokenizer/tokenizer_config.json", model_max_length=10**30),
        refused="tokenizer|model_max_length",
        right=accepted,
    ),
    base("code in the folder", _code, refused="code|mine|auto_map", right=accepted),
    base("a tokenizer that is code", _asks_for_code, refused="tokenizer|code", right=accepted),
    base(
        "a file that is no model",
        lambda f: write(**{"x.safetensors": b"hello"}),
        written="./x.safetensors",
        refused="x.safetensors",
    ),
    base(
        "a single file that is a pickle",
        lambda f: write(**{"x.ckpt": pickle.dumps(Pickled())}),
        written="./x.ckpt",
        refused="x.ckpt",
    ),
    base(
        "a single file with other tensors",
        lambda f: shutil.copy(f / ENCODER, "x.safetensors"),
        written="./x.safetensors",
        refused="x.safetensors",
    ),
    base("a FIFO", lambda f: os.mkfifo("x.safetensors"), written="./x.safetensors", refused="x.safetensors"),
    base("a folder that is not there", written="./gone", refused="gone"),
    base("a folder with nothing in it", lambda f: os.mkdir("e"), written="e", refused="e"),
    base("a name that is not on the hub", written="owner/no-such-model", refused="owner/no-such-model"),
    base("a name with a space", written="'my model'", refused="my model"),
    base("a name that leads out", written="../../gone", refused="gone"),
    base("nothing", written="''", refused=("batch.yaml|base", "base")),
    base("null", written="null", refused=("batch.yaml", "base")),
    base("a number", written="5", refused=("batch.yaml", "base")),
    base("a URL", written="https://hub.example/a/b", refused="https://hub.example/a/b"),
    base("an address with a password", written="https://me:SECRET@127.0.0.1:9/a", refused="base"),
    base("a loop of links", lambda f: os.symlink("loop", "loop"), written="./loop", refused="loop"),
]
