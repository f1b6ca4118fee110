"""`ConceptBatch`: what a user asks for, read from YAML or from the concept lists of other trainers.

Unknown keys are refused with the nearest known one; every error names the file and the key.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.evaluation.prompts import check_prompt, read_prompts
from pipeline.release.place import plain_destination
from training.methods import CUSTOM_DIFFUSION, METHODS
from training.methods.method import RARE_WORDS

MINIATURE = Path(__file__).parent / "miniature"
"""The embedded default: base model, CLIP and judge in the package."""

Positive = Annotated[int, Field(gt=0)]


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
            prompts += read_prompts(folder / Path(entry).expanduser())
        else:
            prompts.append(check_prompt(entry))
    return tuple(prompts)


Prompts = Annotated[tuple[str, ...], BeforeValidator(one_is_a_list), AfterValidator(_read_suites)]
"""Prompts with `{}` for the concept, and .txt files of such prompts, a line each; relative to the batch file."""


class Section(BaseModel):
    """A part of the spec: unknown keys are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ConceptTraining(Section):
    """What one concept trains with instead of the batch's settings, when trained separately."""

    steps: Positive | None = None
    learning_rate: float | None = Field(None, gt=0)
    token_learning_rate: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=0)


class Concept(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Name of the concept, used for files: letters, digits, `-`, `_`."""
    images: Annotated[tuple[str, ...], BeforeValidator(one_is_a_list)]
    """Folder, glob pattern or image files; relative to the batch file."""
    class_word: str = Field(min_length=1)
    """What it is, in the base model's words: `cat`, `wooden pot`."""
    token: str = ""
    """The new token, `<new1>`, `<new2>`, … by position when empty; with `dreambooth` a word of one token that the base
    has and hardly knows, `pll`, `ucd`, … when empty."""
    new_category: bool = False
    """It goes by its class word alone (`moongate`), without a token: the form for a category that the base does not
    know, where the above is for one special cat. Give it a class_prompt the base does know (`gate`)."""
    initializer: str = ""
    """A word of one token the new row starts from; rarely used words in turn when empty."""
    prompts: Prompts = ()
    """Prompts to measure and show this concept with, `{}` standing for the concept, or .txt files of them, a line each;
    the batch's when empty."""
    class_prompt: str = ""
    """Regularisation images are those with captions nearest to this; the class word when empty."""
    training: ConceptTraining = ConceptTraining()
    """Its own steps, learning rates and seed."""

    @field_validator("token")
    @classmethod
    def _token_is_one_word(cls, value: str) -> str:
        if value and any(c.isspace() for c in value):
            raise ValueError(f"a token is one word without spaces, found {value!r}")
        return value

    @property
    def phrase(self) -> str:
        """How prompts name the concept: `<new1> cat`, or `moongate`."""
        return f"{self.token} {self.class_word}".strip()


class Retrieval(Section):
    corpus: str = "miniature"
    """Parquet file, folder, glob or URL of (url, caption) rows or of embeddings as clip-retrieval writes them;
    `miniature` for the embedded world."""
    local: bool = False
    """The corpus is one's own: its images may be on private addresses. The miniature's are."""
    base_url: str = ""
    """What relative urls of the corpus are joined to."""
    clip: str = "miniature"
    """open_clip model: `ViT-B-32/laion2b_s34b_b79k`, a folder, or `miniature`."""
    images: Positive = 200
    """Regularisation images per concept, retrieved or generated (the paper: 200)."""
    oversample: float = Field(5.0, ge=1)
    """Candidates asked for, as a multiple of `images`: old links die."""
    max_nsfw: float | None = None
    """Leave out rows whose NSFW score is above this, where the corpus has one."""
    block_list: str = ""
    """File with sha256 sums, one a line, of images never to use."""
    distributor: Literal["multiprocessing", "ray"] = "multiprocessing"
    """img2dataset's. Each concept's images are one task of the cluster; with `ray` that task is spread over all nodes
    too (few concepts, many nodes), and the store has to be a folder that all nodes share."""
    miniature_captions: Positive = 20_000
    """Rows of the miniature corpus."""


class Zero(Section):
    """DeepSpeed's part of the spec."""

    stage: Literal[1, 2, 3] = 2
    """What the ranks share out: 1 the optimizer's state, 2 the gradients too, 3 the frozen model too."""
    offload: bool = False
    """Keep the optimizer's state, and with stage 3 the weights, in the machine's memory."""
    config: str = ""
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
    steps: Positive | None = None
    """Optimizer steps; the method's per concept trained together when empty (the paper: 250, and 500 for two)."""
    batch_size: Positive = 4
    """Concept images a step; as many regularisation images stand beside them (the paper's batch of 8)."""
    learning_rate: float = Field(CUSTOM_DIFFUSION.learning_rate, gt=0)
    """Of all that trains (the paper: 1e-5 a sample, times 8)."""
    token_learning_rate: float | None = Field(None, gt=0)
    """Of the token rows when it differs."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: bitsandbytes', a quarter of the optimizer's memory."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the regularisation loss."""
    regularization: Literal["real", "generated", "none"] = CUSTOM_DIFFUSION.regularization
    """Images of the class beside the concept's: retrieved ones with their captions, or drawn by the base with the class
    prompt as they stand in `evaluation` (steps, guidance), as DreamBooth's prior preservation does, or none."""
    augment: bool = CUSTOM_DIFFUSION.augment
    """Random resize with size words and masked loss."""
    views: Positive = 64
    """Augmented views of each image whose latents are kept."""
    prompt: str = "photo of a {}"
    """Caption of a concept's image, `{}` standing for the concept."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 on CPU."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    pack_size: Positive | Literal["auto"] = "auto"
    """Sets of weights that train at once over one resident base; auto: as many as the device's memory holds. 1 for
    methods that train more than text K/V layers and tokens."""
    strategy: Literal["single", "ddp", "deepspeed"] = "single"
    """How several ranks share a step's batch; single: one process a pack."""
    ranks: Positive = 1
    """Processes (GPUs) that train one set of weights together; `batch_size` stays what it is, for all of them."""
    deepspeed: Zero = Zero()
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """torch.compile the UNet's transformer blocks: takes a while at the start; meant for GPUs."""
    seed: int = Field(0, ge=0)
    checkpoint_every: Positive = 50
    sample_every: Positive | None = None
    """Draw a sample grid every so many steps (and at the end); at the end only when empty."""

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
            raise ValueError(f"expected one of {', '.join(METHODS)}; found {value!r}")
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
    partial: bool = False
    """Go on without the concepts that failed (the run then ends with exit code 1); otherwise nothing is merged."""
    form: Literal["auto", "hard", "soft"] = "auto"
    """Constraints met exactly, or as a penalty; auto: exactly while that leaves the regularisation captions alone."""
    penalty: float = Field(100.0, gt=0)
    """mu of the soft form, relative to the mean of G's diagonal."""
    captions: Positive = 1000
    """Regularisation captions in G at most (the authors: 200 to 1000)."""
    damping: float = Field(1e-6, ge=0)
    """Added to G's diagonal, relative to its mean, so that its factorisation exists."""
    prompts: tuple[str, ...] = Field(("{}", "photo of a {}"), min_length=1)
    """Constraint prompts; `{}` stands for the concept."""

    @field_validator("prompts")
    @classmethod
    def _prompts_name_the_concept(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_prompt, value))


class Compress(Section):
    max_bytes: Positive | None = None
    """Upper bound of the factors' bytes. When neither is given, a merged model is kept without loss, and a single set
    of weights (one concept, or joint training) is cut to a fifth of its bytes, as in the paper."""
    max_rank: Positive | None = None
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
    prompts: Prompts = Field(("photo of a {}",), min_length=1)
    """As a concept's."""
    samples: Positive = 8
    """Images a prompt."""
    steps: Positive = 50
    guidance: float = 6.0
    seed: int = Field(0, ge=0)
    clip: str = "miniature"
    identity: Literal["miniature", ""] = ""
    """The miniature's identity judge beside CLIP; empty for none."""


class Publish(Section):
    to: str = ""
    """Folder or URL releases go to; `<output>/releases` when empty."""
    hub: str = ""
    """Repository on the Hugging Face hub, `owner/name`, that each new release is copied to."""
    license: str = ""
    """Licence named in the model card, as the hub knows it: `apache-2.0`, `creativeml-openrail-m`."""
    license_name: str = ""
    """Name of a licence that the hub does not know; `license` stays empty then."""
    license_link: str = ""
    """Where that licence can be read."""
    made_by: str = ""
    """Who is named as the maker in manifests; nobody when empty."""
    signing_key: str = ""
    """Ed25519 private key (PEM file) that manifests are signed with; unsigned when empty."""

    @field_validator("to")
    @classmethod
    def _versions_can_be_kept_there(cls, value: str) -> str:
        if value.startswith("hf://"):
            raise ValueError(
                f"the hub gets copies of releases, by `publish.hub: owner/name`; `to` is the folder or bucket they are "
                f"kept in; found {value!r}"
            )
        return plain_destination(value) if value else ""


class Settings(Section):
    """What a batch and a retraining say alike: all but the concepts."""

    name: str = Field("batch", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str = "miniature"
    """Diffusers model: folder, hub name, or `miniature`."""
    output: str = "runs/{name}"
    """Where the store, report and releases are, relative to the working directory."""
    store: str = ""
    """Folder or URL of the artifact store; `<output>/store` when empty. Batches may share one."""
    retrieval: Retrieval = Retrieval()
    training: Training = Training()
    merge: Merge = Merge()
    compress: Compress = Compress()
    evaluation: Evaluation = Evaluation()
    publish: Publish = Publish()

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
                f"retrieval.distributor: 'ray' needs a store in a folder that all nodes share; found {self.store!r}"
            )
        return self

    @field_validator("store")
    @classmethod
    def _artifacts_can_be_kept_there(cls, value: str) -> str:
        return plain_destination(value) if value else ""

    @field_validator("output")
    @classmethod
    def _output_is_local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                f"report and summary go to a local folder; `store` and `publish.to` may be URLs; found {value!r}"
            )
        return value

    @property
    def output_path(self) -> str:
        return self.output.replace("{name}", self.name)

    @property
    def store_url(self) -> str:
        return self.store or f"{self.output_path}/store"

    @property
    def release_url(self) -> str:
        return self.publish.to or f"{self.output_path}/releases"

    @property
    def base_path(self) -> str:
        return base_path(self.base)

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
        for key, place in (("store", self.store_url), ("publish.to", self.release_url), ("output", self.output_path)):
            if "://" not in place and not os.path.isabs(place):
                url = "" if key == "output" else "a URL or "
                raise ValueError(f"{key}: {place!r} is relative; on a cluster give {url}a path that all nodes share")


def doubles(concepts: Sequence[Concept]) -> dict[int, tuple[int, str, str]]:
    """Which concepts have the name or token of an earlier one: index -> the earlier one's, `name` or `token`, and the
    word in lower case: tokenizers and some file systems do not tell case apart."""
    found: dict[int, tuple[int, str, str]] = {}
    seen: dict[tuple[str, str], int] = {}
    for i, concept in enumerate(concepts):
        own = [(field, word.lower()) for field, word in (("name", concept.name), ("token", concept.token)) if word]
        double = next((each for each in own if each in seen), None)
        if double:
            found[i] = (seen[double], *double)
        else:
            seen |= dict.fromkeys(own, i)
    return found


class ConceptBatch(Settings):
    concepts: tuple[Concept, ...] = Field(min_length=1)

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

    def model_post_init(self, _: Any) -> None:
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

    image: float = Field(0.02, ge=0)
    """Of each concept's image alignment (CLIP cosine)."""
    identity: float = Field(0.05, ge=0)
    """Of each concept's identity alignment, where `evaluation.identity` names a judge."""
    text: float = Field(0.01, ge=0)
    """Of the text alignment over all concepts (CLIP cosine)."""
    retention: float = Field(0.02, ge=0)
    """Of the text alignment over all classes, when the release is asked for the bare class (CLIP cosine)."""
    standard_errors: float = Field(1.96, ge=0)
    """Half the width of the interval; 1.96 for 95 %."""


class Retraining(Settings):
    """A batch whose concepts are those of a catalogue, made again whenever they change."""

    catalogue: str = Field(min_length=1)
    """Folder or URL with a folder for each concept: its images and a `concept.yaml`."""
    gate: Gate = Gate()
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
        try:
            return ConceptBatch(**settings, concepts=tuple(concepts))
        except ValidationError as error:
            raise ValueError("\n".join(f"{self.catalogue}: {line}" for line in explain(error, ConceptBatch))) from None


Asked = TypeVar("Asked", bound=Settings)
Read = TypeVar("Read", bound=Section)


def base_path(base: str) -> str:
    """The base model's place: the package's folder for `miniature`."""
    return str(MINIATURE / "model") if base == "miniature" else base


def clip_path(clip: str) -> str:
    """The open_clip model's place: the package's folder for `miniature`."""
    return str(MINIATURE / "clip") if clip == "miniature" else clip


def load_batch(path: str | Path) -> ConceptBatch:
    """Read a batch file: the project's YAML, or a `concepts_list.json` / `dataset.json` of other trainers. `concepts`
    of a YAML file may name such a list.

    Raises:
        ValueError: naming the file, the key, what was found and what is allowed.
    """
    path = Path(path)
    return batch_from(read_mapping(path, "batch file (.yaml or .json)", "concepts"), path)


def batch_from(data: dict[str, Any], path: Path) -> ConceptBatch:
    """The batch that a file at `path` would say with such content; see `load_batch`. A list of concepts that `data`
    names takes its name's place there."""
    if isinstance(data.get("concepts"), str):
        listed = Path(data["concepts"]).expanduser()
        place = path.parent / listed
        entries = _parse(place, "list of concepts (.json)")
        if not isinstance(entries, list):
            raise ValueError(f"{place}: expected a list of concepts, found {type(entries).__name__}")
        data["concepts"] = _from_concepts_list(place, entries, listed.parent)
    data.setdefault("name", re.sub("[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "batch")
    batch = _resolve(validated(ConceptBatch, data, path), path.parent)
    concepts = [
        c.model_copy(update={"images": tuple(_place(i, path.parent) for i in c.images)}) for c in batch.concepts
    ]
    return batch.model_copy(update={"concepts": tuple(concepts)})


def load_retraining(path: str | Path) -> Retraining:
    """Read a retraining file: a batch file with `catalogue` in the place of `concepts`, and a `gate`.

    Raises:
        ValueError: naming the file, the key, what was found and what is allowed.
    """
    path = Path(path)
    data = read_mapping(path, "retraining file (.yaml)", "catalogue")
    data.setdefault("name", re.sub("[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "batch")
    if "concepts" in data:
        raise ValueError(f"{path}: concepts: a retraining has its concepts in the folders of its `catalogue`")
    asked = _resolve(validated(Retraining, data, path), path.parent)
    return asked.model_copy(update={"catalogue": _place(asked.catalogue, path.parent)})


def read_mapping(path: Path, what: str, key: str) -> dict[str, Any]:
    """A YAML or JSON file's mapping. what: it should be, key: it should have, for the messages.

    Raises: ValueError when there is no such file, or something else is in it.
    """
    data = _parse(path, what)
    if isinstance(data, list) and key == "concepts":
        data = {"concepts": _from_concepts_list(path, data, Path())}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping with the key {key!r}, found {type(data).__name__}")
    return data


def _parse(path: Path, what: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the path of a {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text: {error}") from None
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid {path.suffix.lstrip('.').upper() or 'YAML'}: {error}") from None


def validated(model: type[Read], data: dict[str, Any], path: Path | str) -> Read:
    """Raises: ValueError with a line for each key that is wrong, naming the file."""
    try:
        return model.model_validate(data, context={"folder": Path(path).parent})
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in explain(error, model))) from None


def _place(value: str, folder: Path) -> str:
    return value if not value or "://" in value else os.path.abspath(folder / Path(value).expanduser())


def _resolve(settings: Asked, folder: Path) -> Asked:
    """Relative places in a file are relative to the file (not `output`: that is where the user stands)."""
    update: dict[str, Any] = {}
    if settings.retrieval.corpus != "miniature":
        update["retrieval"] = settings.retrieval.model_copy(
            update={
                "corpus": _place(settings.retrieval.corpus, folder),
                "block_list": _place(settings.retrieval.block_list, folder),
            }
        )
    for section in ("retrieval", "evaluation"):
        current = update.get(section, getattr(settings, section))
        if current.clip != "miniature" and (folder / current.clip).is_dir():
            update[section] = current.model_copy(update={"clip": _place(current.clip, folder)})
    if settings.training.deepspeed.config:
        zero = settings.training.deepspeed.model_copy(
            update={"config": _place(settings.training.deepspeed.config, folder)}
        )
        update["training"] = settings.training.model_copy(update={"deepspeed": zero})
    if settings.publish.signing_key:
        key = _place(settings.publish.signing_key, folder)
        update["publish"] = settings.publish.model_copy(update={"signing_key": key})
    if settings.base != "miniature" and (folder / settings.base).is_dir():
        update["base"] = _place(settings.base, folder)
    return settings.model_copy(update=update)


def _from_concepts_list(path: Path, entries: list[Any], folder: Path) -> list[dict[str, Any]]:
    """`[{"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "instance_data_dir": …}, …]`, the form of
    the authors' trainer, of diffusers' `train_custom_diffusion.py` and, with a prompt suite each in `prompt_filename`,
    of the authors' 101-concept benchmark; `class_data_dir` is not used: regularisation images are retrieved.
    folder: of the list, from the batch file's."""
    concepts: list[dict[str, Any]] = []
    known = {"instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir", "prompt_filename"}
    for i, entry in enumerate(entries):
        where = f"{path}: [{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected a mapping, found {type(entry).__name__}")
        for key in entry:
            if key not in known:
                raise ValueError(f"{where}.{key}: unknown key{_nearest(key, known)}")
        for key in ("instance_prompt", "class_prompt", "instance_data_dir"):
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise ValueError(
                    f"{where}.{key}: missing; the form is instance_prompt, class_prompt, instance_data_dir"
                )
        tokens = [w for w in entry["instance_prompt"].split() if w.startswith("<") and w.endswith(">")]
        if len(tokens) > 1:
            raise ValueError(f"{where}.instance_prompt: expected one new token like <new1>, found {tokens}")
        images, suite = Path(entry["instance_data_dir"]), entry.get("prompt_filename")
        class_word = entry["class_prompt"].removeprefix("photo of a ").removeprefix("a photo of a ").strip()
        concepts.append(
            {
                "name": f"{i + 1:03d}-{re.sub('[^A-Za-z0-9_-]', '-', images.name)}",
                "images": [str(folder / images.expanduser())],
                "class_word": class_word,
                "token": tokens[0] if tokens else "",
                "class_prompt": entry["class_prompt"],
                "prompts": [str(folder / suite)] if suite else [],
            }
        )
    if len(concepts) > 1 and len({c["token"] for c in concepts}) == 1:
        for concept in concepts:  # the benchmark trains each in a run of its own, always as `<new1>`
            concept["token"] = ""
    return concepts


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """What is wrong with a file that was to be a `root`, a line for each key."""
    lines = []
    for item in error.errors():
        location = item["loc"]
        key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
        if item["type"] == "extra_forbidden":
            known = _fields_at(root, location[:-1])
            lines.append(f"{key}: unknown key{_nearest(str(location[-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        else:
            found = "" if item["type"] == "value_error" else f", found {item['input']!r}"
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}{found}" if key else message)
    return lines


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if part == "concepts":
            model = Concept
        elif isinstance(part, str) and part in model.model_fields:
            model = model.model_fields[part].annotation  # type: ignore[assignment]
    return list(model.model_fields)
