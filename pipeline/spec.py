"""`ConceptBatch`: what a user asks for, read from YAML or from the concept lists of other trainers.

Unknown keys are refused with the nearest known one; every error names the file and the key.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.concept_lists import concepts_of
from pipeline.evaluation.columns import MEASURED, NOT_MEASURED
from pipeline.evaluation.prompts import check_prompt, read_prompts
from pipeline.mistakes import explain, kinds_of
from pipeline.places import CLIP, check_place, is_path, located, masked
from pipeline.reading import LONGEST_NAME, Written, check_visible, read_written, shown
from pipeline.release.place import plain_destination
from training.methods import CUSTOM_DIFFUSION, METHODS
from training.methods.method import RARE_WORDS
from training.tokens import spelling

MINIATURE = Path(__file__).parent / "miniature"
"""The embedded default: base model, CLIP and judge in the package."""
Steps = Annotated[int, Field(gt=0, le=10_000_000)]
Images = Annotated[int, Field(gt=0, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=1e30)]
"""Of a training that is too high, the training itself says so."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""As much as a column of a table holds."""
Place = Annotated[str, AfterValidator(check_place)]
"""A folder, file, pattern or URL; see `Settings.at`."""


def _destination(place: str) -> str:
    if place.startswith("hf://"):
        raise ValueError(
            "the hub gets copies of releases, by `publish.hub: owner/name`; here stands the folder or bucket that they "
            f"are kept in; found {shown(place)}"
        )
    return plain_destination(place) if place else ""


Destination = Annotated[str, AfterValidator(_destination)]
"""A folder or URL that is written to, or nothing."""


def _one_line(value: str) -> str:
    if value and not value.strip():
        raise ValueError("blank; give a word, or leave it out")
    return " ".join(value.split())


Words = Annotated[str, AfterValidator(_one_line)]
"""Text whose blanks are single spaces between words."""


def one_is_a_list(value: Any) -> Any:
    """A list of places or prompts, of which a file may name a single one without brackets."""
    return (value,) if isinstance(value, str) else value


def is_suite(prompt: str) -> bool:
    """Whether it names a file of prompts."""
    return prompt.endswith(".txt") and "{}" not in prompt


def _read_suites(value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    folder = Path((info.context or {}).get("folder", ""))
    prompts: list[str] = []
    for entry in value:
        if is_suite(entry):
            prompts += read_prompts(folder / os.path.expanduser(entry))
        else:
            prompts.append(check_prompt(entry))
    return tuple(prompts)


OneOrMany = BeforeValidator(one_is_a_list, json_schema_input_type=str | tuple[str, ...])
Prompts = Annotated[tuple[str, ...], OneOrMany, AfterValidator(_read_suites)]
"""Prompts with `{}` for the concept, and .txt files of such prompts, a line each; relative to the batch file."""


class Section(BaseModel):
    """A part of the spec: unknown keys are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_not_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Which Python takes for each other."""
        kinds = set(kinds_of(cls.model_fields[str(info.field_name)].annotation))
        numbers, booleans = not kinds.isdisjoint((int, float)), bool in kinds
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, bool) and numbers and not booleans:
                raise PydanticCustomError("number", "expected a number")
            if type(each) in (int, float) and booleans and not numbers:
                raise PydanticCustomError("boolean", "expected true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _texts_can_be_seen(cls, value: Any) -> Any:
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, str):
                check_visible(each)
        return value


class Mark(enum.Enum):
    """What a setting is, said on its field; what is sent to a cluster and what is published follow from it."""

    FILE = enum.auto()
    """Names a file or folder of the user's; a job that is submitted takes it along."""
    MODEL = enum.auto()
    """Names a model, which may be a folder: taken along, and published without the folders above it."""
    IMAGES = enum.auto()
    """Names images: taken along."""
    SUITES = enum.auto()
    """Prompts, some of which may be files: taken along."""
    PRIVATE = enum.auto()
    """Says where things are or how they are done, not what is made: not published."""
    LATER = enum.auto()
    """Came when there were releases already: not published while it is empty, so that these are found again."""


def marked(model: type[BaseModel], *marks: Mark) -> Iterator[tuple[str, ...]]:
    """Keys of the settings that have one of these marks, section by section; `*` stands for each of a list."""
    for name, field in model.model_fields.items():
        if any(mark in field.metadata for mark in marks):
            yield (name,)
        section, is_list = section_of(field.annotation)
        if section:
            way = (name, "*") if is_list else (name,)
            yield from (way + rest for rest in marked(section, *marks))


def sections(data: dict[str, Any], way: Sequence[str]) -> list[dict[str, Any]]:
    """The sections of what a file says that a way leads to, as `marked` gives it; none where it leaves them out."""
    found: list[Any] = [data]
    for key in way:
        found = [each for one in found for each in (one if key == "*" else [one.get(key)]) if each]
    return found


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if any, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in getattr(annotation, "__args__", ()):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part, True
    return None, False


class ConceptTraining(Section):
    """What one concept trains with instead of the batch's settings, when trained separately."""

    steps: Steps | None = None
    """Optimizer steps."""
    learning_rate: Rate | None = None
    """Of the K/V weights, or whatever the method trains."""
    token_learning_rate: Rate | None = None
    """Of the token's row."""
    seed: Seed | None = None
    """Of noise, samples and views."""


class Concept(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=LONGEST_NAME)
    """Name of the concept, used for files: letters, digits, `-`, `_`."""
    images: Annotated[tuple[str, ...], OneOrMany, Mark.IMAGES, Mark.PRIVATE]
    """Folder, glob pattern or image files; relative to the batch file."""
    class_word: Words
    """What it is, in the base model's words: `cat`, `wooden pot`."""
    token: str = ""
    """The new token, `<new1>`, `<new2>`, … by position when empty; with `dreambooth` a word of one token that the base
    has and hardly knows, `pll`, `ucd`, … when empty."""
    new_category: bool = False
    """It goes by its class word alone (`moongate`), without a token: the form for a category that the base does not
    know, where the above is for one special cat. Give it a class_prompt the base does know (`gate`)."""
    initializer: Words = ""
    """A word of one token that the new token's row starts from; a random row of its own when empty."""
    prompts: Annotated[Prompts, Mark.SUITES] = ()
    """Prompts to measure and show this concept with, `{}` standing for the concept, or .txt files of them, a line each;
    the batch's when empty."""
    class_prompt: Words = ""
    """Regularisation images are those with captions nearest to this; the class word when empty."""
    training: ConceptTraining = ConceptTraining()
    """Its own steps, learning rates and seed."""

    @field_validator("class_word")
    @classmethod
    def _class_word_is_not_blank(cls, value: str) -> str:
        if not value:
            raise ValueError("blank; name what it is in the base model's words, like 'cat'")
        return value

    @field_validator("token")
    @classmethod
    def _token_is_one_word(cls, value: str) -> str:
        if value and any(c.isspace() for c in value):
            raise ValueError(f"a token is one word without spaces, found {shown(value)}")
        if len(value.encode()) > LONGEST_NAME:
            raise ValueError(f"a token has at most {LONGEST_NAME} bytes, as a part of file names; found {shown(value)}")
        return value

    @property
    def phrase(self) -> str:
        """How prompts name the concept: `<new1> cat`, or `moongate`."""
        return f"{self.token} {self.class_word}".strip()


class Retrieval(Section):
    corpus: Annotated[Place, Mark.FILE, Mark.PRIVATE] = "miniature"
    """Parquet file, folder, glob or URL of (url, caption) rows or of embeddings as clip-retrieval writes them;
    `miniature` for the embedded world."""
    local: bool = False
    """The corpus is one's own: its images may be on private addresses. The miniature's are."""
    base_url: Annotated[str, Mark.PRIVATE] = ""
    """What relative urls of the corpus are joined to."""
    clip: Annotated[str, Mark.MODEL] = "miniature"
    """open_clip model: `ViT-B-32/laion2b_s34b_b79k`, a folder, or `miniature`."""
    images: Images = 200
    """Regularisation images per concept, retrieved or generated (the paper: 200)."""
    oversample: float = Field(5.0, ge=1, le=1000)
    """Candidates asked for, as a multiple of `images`: old links die."""
    max_nsfw: float | None = Field(None, ge=0, le=1)
    """Leave out rows whose NSFW score is above this, and rows without one; the corpus has to have the column."""
    block_list: Annotated[str, Mark.FILE, Mark.PRIVATE] = ""
    """File with sha256 sums of images never to use, one a line as `sha256sum` and others print them."""
    distributor: Annotated[Literal["multiprocessing", "ray"], Mark.PRIVATE] = "multiprocessing"
    """img2dataset's. Each concept's images are one task of the cluster; with `ray` that task is spread over all nodes
    too (few concepts, many nodes), and the store has to be a folder that all nodes share."""
    miniature_captions: int = Field(20_000, gt=0, le=10_000_000)
    """Rows of the miniature corpus."""

    @field_validator("base_url")
    @classmethod
    def _no_user_is_named(cls, value: str) -> str:
        if masked(value) != value:
            raise ValueError(f"images are asked for without user names and passwords; found {masked(value)!r}")
        return value


class Zero(Section):
    """DeepSpeed's part of the spec."""

    stage: Literal[1, 2, 3] = 2
    """What the ranks share out: 1 the optimizer's state, 2 the gradients too, 3 the frozen model too."""
    offload: bool = False
    """Keep the optimizer's state, and with stage 3 the weights, in the machine's memory."""
    config: Annotated[str, Mark.FILE] = ""
    """A DeepSpeed configuration (JSON) instead of one made of these settings. Batch sizes and clipping may be left out,
    being the batch file's."""


class Training(Section):
    """The method's own defaults stand in for `learning_rate`, `regularization` and `augment`, where they are not given:
    see docs/methods.md. Those below are Custom Diffusion's."""

    method: str = CUSTOM_DIFFUSION.name
    """What trains: `custom_diffusion`, `custom_diffusion_crossattn`, `custom_diffusion_all`, `dreambooth` or
    `textual_inversion`."""
    train_text_encoder: bool = False
    """With `dreambooth`: the text encoder trains too."""
    composition: Literal["merged", "joint"] = "merged"
    """Several concepts: one set of weights each, folded by the merge; or all trained together into one set."""
    steps: Steps | None = None
    """Optimizer steps; the method's per concept trained together when empty (the paper: 250, and 500 for two)."""
    batch_size: int = Field(4, gt=0, le=10_000)
    """Concept images a step; as many regularisation images stand beside them (the paper's batch of 8)."""
    learning_rate: Rate = CUSTOM_DIFFUSION.learning_rate
    """Of all that trains (the paper: 1e-5 a sample, times 8)."""
    token_learning_rate: Rate | None = None
    """Of the token rows when it differs."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: bitsandbytes', a quarter of the optimizer's memory."""
    weight_decay: float = Field(0.0, ge=0, le=100)
    """AdamW's."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e12)
    """Gradients of a set of weights are scaled down to this norm."""
    prior_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the regularisation loss."""
    regularization: Literal["real", "generated", "none"] = CUSTOM_DIFFUSION.regularization
    """Images of the class beside the concept's: retrieved ones with their captions, or drawn by the base with the class
    prompt as they stand in `evaluation` (steps, guidance), as DreamBooth's prior preservation does, or none."""
    augment: bool = CUSTOM_DIFFUSION.augment
    """Random resize with size words and masked loss."""
    flip: bool = False
    """Mirror half of the views, and of the regularisation images (the authors do). Not for concepts with writing on
    them, or whose left and right matter."""
    views: int = Field(64, gt=0, le=1_000_000_000)
    """Augmented views of each image whose latents are kept."""
    prompt: str = "photo of a {}"
    """Caption of a concept's image, `{}` standing for the concept."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 on CPU."""
    attention: Annotated[Literal["auto", "xformers", "sdpa"], Mark.PRIVATE] = "auto"
    """auto: xformers where it is installed and the device is a GPU, else PyTorch's own."""
    pack_size: Annotated[Annotated[int, Field(gt=0, le=10_000)] | Literal["auto"], Mark.PRIVATE] = "auto"
    """Sets of weights that train at once over one resident base; auto: as many as the device's memory holds. 1 for
    methods that train more than text K/V layers and tokens."""
    strategy: Annotated[Literal["single", "ddp", "deepspeed"], Mark.PRIVATE] = "single"
    """How several ranks share a step's batch; single: one process a pack."""
    ranks: Annotated[int, Mark.PRIVATE] = Field(1, gt=0, le=10_000)
    """Processes (GPUs) that train one set of weights together; `batch_size` stays what it is, for all of them."""
    deepspeed: Annotated[Zero, Mark.PRIVATE] = Zero()
    """With `strategy: deepspeed`."""
    gradient_checkpointing: Annotated[bool, Mark.PRIVATE] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    compile: Annotated[bool, Mark.PRIVATE] = False
    """torch.compile the UNet's transformer blocks: takes a while at the start; meant for GPUs."""
    seed: Seed = 0
    """Of noise, samples and views; a concept's weights depend on it, not on who else is in its pack."""
    checkpoint_every: Annotated[Steps, Mark.PRIVATE] = 50
    """Steps between checkpoints, from which a training that was cut off goes on."""
    sample_every: Annotated[Steps | None, Mark.PRIVATE] = None
    """Draw a grid of samples every so many steps, and at the end, for the report and TensorBoard; none when empty: the
    evaluation draws the same concepts, too."""

    @field_validator("prompt")
    @classmethod
    def _prompt_names_the_concept(cls, value: str) -> str:
        return check_prompt(value)

    @model_validator(mode="before")
    @classmethod
    def _method_has_defaults(cls, data: Any) -> Any:
        method = METHODS.get(str(data.get("method"))) if isinstance(data, dict) else None
        own = ("learning_rate", "regularization", "augment")
        return {key: getattr(method, key) for key in own} | data if method else data

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"expected one of {', '.join(METHODS)}; found {shown(value)}")
        return value

    @model_validator(mode="after")
    def _method_can_do_it(self) -> Training:
        method = METHODS[self.method]
        if self.train_text_encoder and not method.text_encoder:
            able = " or ".join(m.name for m in METHODS.values() if m.text_encoder)
            raise ValueError(f"train_text_encoder: {self.method} leaves the text encoder alone; use {able}")
        if not method.mergeable and self.pack_size not in ("auto", 1):
            raise ValueError(
                f"pack_size: {self.pack_size} sets of weights of {self.method} cannot train at once, only text K/V "
                "layers and tokens can; use 1 or 'auto'"
            )
        if self.strategy == "deepspeed" and self.method != CUSTOM_DIFFUSION.name:
            raise ValueError(f"strategy: 'deepspeed' trains {CUSTOM_DIFFUSION.name} only; use 'ddp' for {self.method}")
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> Training:
        if self.optimizer == "adamw8bit" and self.strategy == "deepspeed":
            raise ValueError("optimizer: 'adamw8bit' does not go with DeepSpeed; use 'adamw', or another strategy")
        if self.strategy == "single" and self.ranks > 1:
            raise ValueError(f"ranks: {self.ranks} need strategy 'ddp' or 'deepspeed'; 'single' is one process")
        if self.batch_size % self.ranks:
            raise ValueError(f"batch_size: {self.batch_size} cannot be shared evenly by {self.ranks} ranks")
        return self


class Merge(Section):
    partial: Annotated[bool, Mark.PRIVATE] = False
    """Go on without the concepts that failed (the run then ends with exit code 5); otherwise nothing is merged."""
    form: Literal["soft", "paper"] = "soft"
    """`soft` keeps each concept as close to its own weights as `max_drift` allows, over many prompts. `paper` meets the
    constraint prompts exactly (Custom Diffusion, equation 4), whatever that moves. (`auto` and `hard` are their older
    names.)"""
    max_drift: float = Field(0.1, gt=0, le=1e6)
    """How far the regularisation captions' keys and values may move, as a share of their size (a single concept's
    training moves them by about 0.1). Beyond it each concept is met less."""
    penalty: float | None = Field(None, gt=0, le=1e12)
    """mu of the soft form, relative to the mean of G's diagonal; the largest that keeps to `max_drift` when empty."""
    captions: Images = 1000
    """Regularisation captions in G at most (the authors: 200 to 1000)."""
    damping: float = Field(1e-6, ge=0, le=1)
    """Added to G's diagonal, relative to its mean, so that its factorisation exists."""
    prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Constraint prompts; `{}` stands for the concept. By default fourteen of many forms, or the paper's two."""

    @field_validator("form", mode="before")
    @classmethod
    def _older_names(cls, value: Any) -> Any:
        return {"auto": "soft", "hard": "paper"}.get(value, value) if isinstance(value, str) else value

    @field_validator("prompts")
    @classmethod
    def _prompts_name_the_concept(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return value and tuple(map(check_prompt, value))


class Compress(Section):
    max_bytes: int | None = Field(None, gt=0, le=2**40)
    """Upper bound of the factors' bytes. When neither is given, a merged model is kept without loss, and a single set
    of weights (one concept, or joint training) is cut to a fifth of its bytes, as in the paper."""
    max_rank: int | None = Field(None, gt=0, le=100_000)
    """Upper bound of the rank."""
    spectrum: float | None = Field(None, gt=0, le=1)
    """Cut a single set of weights as the authors do instead: of each matrix, the largest singular values that hold this
    share of their sum (the authors: 0.6)."""

    @model_validator(mode="after")
    def _one_bound(self) -> Compress:
        if self.spectrum is not None and (self.max_bytes or self.max_rank):
            raise ValueError("spectrum: is a bound of its own; leave out max_bytes and max_rank")
        return self


class Evaluation(Section):
    prompts: Annotated[Prompts, Mark.SUITES] = Field(("photo of a {}",), min_length=1)
    """As a concept's."""
    samples: int = Field(8, gt=0, le=10_000)
    """Images a prompt."""
    steps: int = Field(50, gt=0, le=100_000)
    """DDIM steps of an image."""
    guidance: float = Field(6.0, ge=-100, le=100)
    """Scale of classifier-free guidance."""
    seed: Seed = 0
    """Of a prompt's first image; the next ones count on from it. All models draw from the same seeds."""
    clip: Annotated[str, Mark.MODEL] = "miniature"
    """The judge of text and image alignment, an open_clip model as in `retrieval.clip`."""
    identity: Literal["miniature", ""] = ""
    """The miniature's identity judge beside CLIP; empty for none."""
    judges: Annotated[dict[str, str], Mark.MODEL, Mark.LATER] = Field(default_factory=dict)
    """More judges of what the concept looks like, each with a column of its own: `dino: vit_small_patch16_224.dino`.
    A timm model by name or folder, or `clip:` before an open_clip model."""

    @field_validator("judges")
    @classmethod
    def _judges_have_names_of_their_own(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if (
                not re.fullmatch("[a-z][a-z0-9_]{0,29}", name)
                or name in MEASURED | NOT_MEASURED
                or name.endswith("_se")
            ):
                raise ValueError(
                    f"a judge's name is a short word of small letters, and no measure or column; found {shown(name)}"
                )
        return value

    @property
    def all_judges(self) -> dict[str, str]:
        """Name -> model, the identity judge among them."""
        return ({"identity": self.identity} if self.identity else {}) | self.judges


class Publish(Section):
    to: Annotated[Destination, Mark.PRIVATE] = ""
    """Folder or URL releases go to; `<output>/releases` when empty."""
    hub: Annotated[str, Mark.PRIVATE] = ""
    """Repository on the Hugging Face hub, `owner/name`, that each new release is copied to."""
    license: str = ""
    """Licence named in the model card, as the hub knows it: `apache-2.0`, `creativeml-openrail-m`."""
    license_name: str = ""
    """Name of a licence that the hub does not know; `license` stays empty then."""
    license_link: str = ""
    """Where that licence can be read."""
    made_by: Annotated[str, Mark.PRIVATE] = ""
    """Who is named as the maker in manifests; nobody when empty."""
    signing_key: Annotated[str, Mark.PRIVATE] = ""
    """Ed25519 private key (PEM file) that manifests are signed with; unsigned when empty."""

    @field_validator("hub")
    @classmethod
    def _hub_has_such_names(cls, value: str) -> str:
        try:
            validate_repo_id(value or "owner/name")
            known = not value or value.count("/") == 1
        except HFValidationError:
            known = False
        if not known:
            raise ValueError(f"expected a repository of the hub, owner/name; found {shown(value)}")
        return value


def local_folder(value: str) -> str:
    """Where results for people go. Raises: ValueError for a URL, or nothing."""
    check_place(value)
    if not value or "://" in value:
        raise ValueError(
            f"report and summary go to a local folder; `store` and `publish.to` may be URLs; found {shown(value)}"
        )
    return value


class Settings(Section):
    """What a batch and a retraining say alike: all but the concepts. Places stand here as the file names them."""

    name: str = Field("batch", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME)
    """Stands in `output` and in the release's file names."""
    base: Annotated[str, Mark.MODEL] = "miniature"
    """Diffusers model: folder, hub name, or `miniature`."""
    output: Annotated[str, AfterValidator(local_folder), Mark.PRIVATE] = "runs/{name}"
    """Where the store, report and releases are: alone of all places relative to the working directory, not to the
    file."""
    store: Annotated[Destination, Mark.PRIVATE] = ""
    """Folder or URL of the artifact store; `<output>/store` when empty. Batches may share one."""
    retrieval: Retrieval = Retrieval()
    """Where regularisation images come from."""
    training: Training = Training()
    """How concepts are taught."""
    merge: Merge = Merge()
    """How they become one model."""
    compress: Compress = Compress()
    """How small the model is to be."""
    evaluation: Evaluation = Evaluation()
    """What is drawn and measured."""
    publish: Publish = Publish()
    """Where the release goes, and what it says."""
    _folder: Path = PrivateAttr(Path())

    def model_post_init(self, context: Any) -> None:
        self._folder = Path((context or {}).get("folder", ""))

    @property
    def folder(self) -> Path:
        """Of the file, which the places in it are relative to."""
        return self._folder

    def at(self, place: str) -> str:
        """Where a place is that the file names: an absolute path or a URL."""
        return located(place, self.folder)

    @model_validator(mode="after")
    def _miniature_is_for_the_miniature(self) -> Self:
        places = {"evaluation.clip": self.evaluation.clip}
        if self.training.regularization == "real":
            places |= {"retrieval.corpus": self.retrieval.corpus, "retrieval.clip": self.retrieval.clip}
        toys = sorted(key for key, value in places.items() if value == "miniature")
        if self.base != "miniature" and toys:
            raise ValueError(
                f"{', '.join(toys)}: 'miniature' knows only its own small world; name your own beside {self.base!r}"
            )
        return self

    @model_validator(mode="after")
    def _nodes_share_the_store(self) -> Self:
        if self.retrieval.distributor == "ray" and "://" in self.store:
            raise ValueError(
                "retrieval.distributor: 'ray' needs a store in a folder that all nodes share; found "
                f"{shown(self.store)}"
            )
        return self

    @property
    def output_path(self) -> str:
        return os.path.expanduser(self.output.replace("{name}", self.name))

    @property
    def store_url(self) -> str:
        return self.at(self.store) or f"{self.output_path}/store"

    @property
    def release_url(self) -> str:
        return self.at(self.publish.to) or f"{self.output_path}/releases"

    @property
    def base_path(self) -> str:
        return base_path(self.base, self.folder)

    @property
    def judge_places(self) -> dict[str, str]:
        """Judges beside CLIP, name -> place."""
        return {name: judge_path(model, self.folder) for name, model in self.evaluation.all_judges.items()}

    @property
    def corpus(self) -> str:
        """`miniature`, or an absolute path or URL."""
        return self.retrieval.corpus if self.retrieval.corpus == "miniature" else self.at(self.retrieval.corpus)

    @property
    def signing_key(self) -> str:
        return self.at(self.publish.signing_key)

    def check_concept(self, concept: Concept) -> None:
        """Raises: ValueError for what a concept says that these settings have no use for."""
        method = METHODS[self.training.method]
        if self.training.composition == "joint" and concept.training != ConceptTraining():
            raise ValueError("training: concepts trained jointly share the batch's training")
        if concept.new_category and concept.token:
            raise ValueError("token: a new_category goes by its class word, without a token")
        if concept.initializer and (concept.new_category or method.token == "rare"):
            why = "a new_category has no token" if concept.new_category else f"{method.name} makes no new token"
            raise ValueError(f"initializer: not used: {why}")
        if concept.new_category and method.unet == "none":
            raise ValueError(f"new_category: {method.name} trains nothing but the token it lacks")

    def check_places(self) -> None:
        """Raises: ValueError for places that other machines would not find."""
        for key, place in (("store", self.store), ("publish.to", self.publish.to), ("output", self.output)):
            if place and "://" not in place and not os.path.isabs(os.path.expanduser(place)):
                url = "" if key == "output" else "a URL or "
                raise ValueError(f"{key}: {place!r} is relative; on a cluster give {url}a path that all nodes share")


def doubles(concepts: Sequence[Concept]) -> dict[int, tuple[int, str, str]]:
    """Which concepts have the name or token of an earlier one, or, being new categories, its class word: index -> the
    earlier one's, the field, and its `spelling`."""
    found: dict[int, tuple[int, str, str]] = {}
    seen: dict[tuple[str, str], int] = {}
    for i, concept in enumerate(concepts):
        fields = {"name": concept.name, "token": concept.token}
        if concept.new_category:  # by which it goes
            fields["class_word"] = concept.class_word
        own = [(field, spelling(word)) for field, word in fields.items() if word]
        double = next((each for each in own if each in seen), None)
        if double:
            found[i] = (seen[double], *double)
        else:
            seen |= dict.fromkeys(own, i)
    return found


class ConceptBatch(Settings):
    concepts: tuple[Concept, ...] = Field(min_length=1)
    """What is to be taught."""
    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was understood of another trainer's list of concepts otherwise than it may be meant."""
        return self._notes

    @model_validator(mode="after")
    def _concepts_differ(self) -> ConceptBatch:
        for second, (first, field, value) in doubles(self.concepts).items():
            raise ValueError(
                f"concepts[{first}] and concepts[{second}] have the same {field} {value!r}; each needs its own"
            )
        return self

    @model_validator(mode="after")
    def _method_suits_the_concepts(self) -> ConceptBatch:
        method = METHODS[self.training.method]
        if len(self.concepts) > 1 and self.training.composition == "merged" and not method.mergeable:
            raise ValueError(
                f"training.composition: 'merged' folds changes of text K/V layers only, and {method.name} changes "
                "more; use 'joint', or a batch for each concept"
            )
        if method.unet != "text_kv" and self.compress != Compress():
            raise ValueError(f"compress: only changes of text K/V layers have low-rank factors, not {method.name}'s")
        for i, concept in enumerate(self.concepts):
            try:
                self.check_concept(concept)
            except ValueError as error:
                raise ValueError(f"concepts[{i}].{error}") from None
        return self

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        self._notes = tuple((context or {}).get("notes", ()))
        taken = {c.token for c in self.concepts}
        rare = METHODS[self.training.method].token == "rare"
        words = RARE_WORDS if rare else [f"<new{i}>" for i in range(1, 2 * len(self.concepts) + 1)]
        free = iter([word for word in words if word not in taken])
        filled = []
        for i, concept in enumerate(self.concepts):
            token = concept.token if concept.token or concept.new_category else next(free, "")
            if not token and not concept.new_category:
                raise ValueError(
                    f"concepts[{i}].token: {', '.join(RARE_WORDS)} are given out; name a rare word yourself"
                )
            filled.append(concept.model_copy(update={"token": token}))
        object.__setattr__(self, "concepts", tuple(filled))

    def prompts_of(self, concept: Concept) -> tuple[str, ...]:
        return concept.prompts or self.evaluation.prompts


class Gate(Section):
    """How far a new release may fall behind the current one: a measure's mean change, image by image on the same
    prompts and seeds, may lie this far below zero beyond its interval."""

    image: float = Field(0.02, ge=0, le=2)
    """Of each concept's image alignment (CLIP cosine)."""
    identity: float = Field(0.05, ge=0, le=2)
    """Of each concept's alignment by `evaluation.identity` and `evaluation.judges`, where there are any (cosine)."""
    text: float = Field(0.01, ge=0, le=2)
    """Of the text alignment over all concepts (CLIP cosine)."""
    retention: float = Field(0.02, ge=0, le=2)
    """Of the text alignment over all classes, when the release is asked for the bare class (CLIP cosine)."""
    standard_errors: float = Field(1.96, ge=0, le=100)
    """Half the width of the interval; 1.96 for 95 %."""


class Retraining(Settings):
    """A batch whose concepts are those of a catalogue, made again whenever they change."""

    catalogue: Place = Field(min_length=1)
    """Folder or URL with a folder for each concept: its images and a `concept.yaml`."""
    gate: Gate = Gate()
    """What a new release must keep of the current one."""
    lease: float = Field(600, ge=5, le=86_400)
    """Seconds after which a run that died no longer keeps others out; a living one renews its lease meanwhile."""

    @model_validator(mode="after")
    def _intervals_need_images(self) -> Self:
        if self.evaluation.samples < 2:
            raise ValueError(
                "evaluation.samples: the gate compares by intervals, which need at least 2 images a prompt"
            )
        return self

    def with_concepts(self, concepts: Sequence[Concept]) -> ConceptBatch:
        """Raises: ValueError for concepts that do not go together, or not with these settings."""
        settings = {key: getattr(self, key) for key in Settings.model_fields}
        data = settings | {"concepts": tuple(concepts)}
        try:
            return ConceptBatch.model_validate(data, context={"folder": self.folder})
        except ValidationError as error:
            raise ValueError("\n".join(explain(error, ConceptBatch, self.catalogue))) from None


Asked = TypeVar("Asked", bound=Settings)
Read = TypeVar("Read", bound=Section)


def base_path(base: str, folder: str | Path = "") -> str:
    """The base model's place: the package's folder for `miniature`, a hub's name as it is. folder: of the file that
    names it."""
    return str(MINIATURE / "model") if base == "miniature" else _model_path(base, folder)


def clip_path(clip: str, folder: str | Path = "") -> str:
    """The open_clip model's place, as `base_path`."""
    return str(MINIATURE / "clip") if clip == "miniature" else _model_path(clip, folder)


def _model_path(name: str, folder: str | Path) -> str:
    return os.path.abspath(os.path.join(folder, os.path.expanduser(name))) if is_path(name, folder) else name


def judge_path(judge: str, folder: str | Path = "") -> str:
    """The place of a judge of `evaluation.judges`, as `base_path`."""
    if judge == "miniature":
        return judge
    prefix = CLIP if judge.startswith(CLIP) else ""
    return prefix + _model_path(judge.removeprefix(CLIP), folder)


def public_name(model: str) -> str:
    """How a release names a model: as the file does, but of a path that tells of a machine, the last part only."""
    if model.startswith(CLIP):
        return CLIP + public_name(model.removeprefix(CLIP))
    return os.path.basename(os.path.normpath(model)) if model.startswith(("/", "~")) else masked(model)


# --- reading -------------------------------------------------------------------------------------------


def load_batch(path: str | Path) -> ConceptBatch:
    """Read a batch file: the project's YAML, or a `concepts_list.json` / `dataset.json` of other trainers. `concepts`
    of a YAML file may name such a list.

    Raises:
        ValueError: naming the file, the line and key, what was found and what is allowed.
    """
    return batch_from(read_batch(Path(path)))


@dataclass(frozen=True)
class BatchFile:
    """What a batch file says, or would say.

    data: with the concepts of another trainer's list in the project's form. written: the file itself, where there is
    one. notes: what of that list was understood otherwise than it may be meant.
    """

    path: Path
    data: dict[str, Any]
    written: Written | None = None
    notes: tuple[str, ...] = ()


def read_batch(path: Path) -> BatchFile:
    """Raises: ValueError when there is no such file, or it is none of a batch; `batch_from` checks what it says."""
    written = read_written(path, "batch file (.yaml or .json)")
    if isinstance(written.value, list):
        concepts, notes = concepts_of(path, written.value, Path(), CUSTOM_DIFFUSION)
        inner = {"concepts": written}
        return BatchFile(path, {"concepts": concepts}, Written(None, written.line, inner=inner), notes)
    data = dict(_mapping(path, written, "concepts"))
    if not isinstance(data.get("concepts"), str):
        return BatchFile(path, data, written)
    place = Path(os.path.expanduser(data["concepts"]))
    entries = read_written(path.parent / place, "list of concepts (.json)").value
    if not isinstance(entries, list):
        raise ValueError(f"{path.parent / place}: expected a list of concepts, found {shown(entries)}")
    training = data.get("training")
    method = METHODS.get(str(training.get("method")) if isinstance(training, dict) else "", CUSTOM_DIFFUSION)
    concepts, notes = concepts_of(path.parent / place, entries, place.parent, method)
    return BatchFile(path, data | {"concepts": concepts}, written, notes)


def batch_from(file: BatchFile) -> ConceptBatch:
    """Raises: as `load_batch`."""
    data = {"name": _name_of(file.path)} | file.data
    batch = validated(ConceptBatch, data, file.path, file.written, notes=file.notes)
    concepts = [c.model_copy(update={"images": tuple(map(batch.at, c.images))}) for c in batch.concepts]
    return batch.model_copy(update={"concepts": tuple(concepts)})


def load_retraining(path: str | Path) -> Retraining:
    """Read a retraining file: a batch file with `catalogue` in the place of `concepts`, and a `gate`.

    Raises:
        ValueError: naming the file, the line and key, what was found and what is allowed.
    """
    path = Path(path)
    written = read_mapping(path, "retraining file (.yaml)", "catalogue")
    data = {"name": _name_of(path)} | written.value
    if "concepts" in data:
        raise ValueError(f"{path}: concepts: a retraining has its concepts in the folders of its `catalogue`")
    return validated(Retraining, data, path, written)


def _name_of(file: Path) -> str:
    """Of a batch that does not say its own."""
    return re.sub("[^A-Za-z0-9._-]", "-", file.stem).lstrip("._-")[:LONGEST_NAME] or "batch"


def overridden(settings: Asked, **given: Any) -> Asked:
    """Settings with others in their place that the command line gave: None where it gave none.

    Raises: ValueError as for a file, naming the option.
    """
    data = dict(settings) | {key: value for key, value in given.items() if value is not None}
    notes = settings.notes if isinstance(settings, ConceptBatch) else ()
    try:
        return type(settings).model_validate(data, context={"folder": settings.folder, "notes": notes})
    except ValidationError as error:
        raise ValueError("\n".join(f"--{line}" for line in explain(error, type(settings)))) from None


def read_mapping(path: Path, what: str, key: str) -> Written:
    """A YAML or JSON file with a mapping. what: it should be, key: it should have, for the messages.

    Raises: ValueError when there is no such file, or something else is in it.
    """
    written = read_written(path, what)
    _mapping(path, written, key)
    return written


def _mapping(path: Path, written: Written, key: str) -> dict[str, Any]:
    if not isinstance(written.value, dict):
        raise ValueError(f"{path}: expected a mapping with the key {key!r}, found {shown(written.value)}")
    return written.value


def validated(
    model: type[Read], data: dict[str, Any], path: Path, written: Written | None = None, notes: Sequence[str] = ()
) -> Read:
    """A part of the spec from what a file says. written: the file itself, where the lines of mistakes are known.

    Raises: ValueError with a line for each key that is wrong, naming the file.
    """
    try:
        return model.model_validate(data, context={"folder": path.parent, "notes": notes})
    except ValidationError as error:
        raise ValueError("\n".join(explain(error, model, str(path), written))) from None
