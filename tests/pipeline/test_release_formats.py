import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipeline.merge.factors import SHARED, MergedModel
from pipeline.release.card import CardConcept, write_card
from pipeline.release.formats import write_formats
from pipeline.release.formats.custom_diffusion import write_custom_diffusion
from pipeline.release.formats.kohya import kohya_metadata, kohya_name
from pipeline.release.formats.lora import check_lora
from pipeline.release.formats.names import LORA, RESERVED, file_stem, token_files
from pipeline.release.formats.tokens import write_tokens
from pipeline.release.formats.whole import save_text_encoder
from training.backbone import text_kv_layers
from training.checkpoint import save_tensors

MINIATURE = Path(__file__).parents[2] / "pipeline/miniature/model"
ODD = "<a|b>"
PROMPT = "photo of a <new1> cat"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return base()


def base() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MINIATURE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def merged_for(
    pipe: DiffusionPipeline, *, shared: bool = True, tokens: tuple[str, ...] = ("<new1>", ODD)
) -> MergedModel:
    """A random change as large as the weights are, float16; ranks differ from layer to layer unless shared."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: module.weight for name, module in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    ranks = {name: 5 if shared else 2 + i % 3 for i, name in enumerate(layers)}

    def draw(rows: int, columns: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).half()

    left = {name: draw(w.shape[0], ranks[name], w.std().item()) for name, w in layers.items()}
    width = next(iter(layers.values())).shape[1]
    right = {SHARED: draw(5, width, 0.5)} if shared else {name: draw(ranks[name], width, 0.5) for name in layers}
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    widths = [e.get_input_embeddings().embedding_dim for e in encoders if e is not None]
    rows = {token: [draw(1, w, 0.02)[0] for w in widths] for token in tokens}
    return MergedModel(left, right, rows, {"concepts": ["cat"]})


@pytest.fixture(scope="module")
def merged(pipe: StableDiffusionPipeline) -> MergedModel:
    return merged_for(pipe)


@pytest.fixture(scope="module")
def release(pipe: StableDiffusionPipeline, merged: MergedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    vocabulary = len(pipe.tokenizer)
    write_formats(merged, pipe, folder, name="pets")
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    concepts = [
        CardConcept("tom", "<new1>", "cat", residual=1e-6, measures={"image alignment": 0.75}),
        CardConcept("odd", ODD, "wooden | `pot`"),
    ]
    write_card(folder, concepts, name="pets", base_model="miniature", base_digest="abc", grid="samples.png")
    # the base is as it was
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(pipe.tokenizer) == vocabulary
    assert pipe.text_encoder.get_input_embeddings().num_embeddings == vocabulary
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    return folder


def applied(merged: MergedModel) -> StableDiffusionPipeline:
    """The pipeline with the change added to its weights, without any loader."""
    pipe = base()
    for layer, delta in merged.deltas.items():
        pipe.unet.get_submodule(layer).weight.data += delta
    pipe.tokenizer.add_tokens(list(merged.tokens))
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    for token, rows in merged.tokens.items():
        number = pipe.tokenizer.convert_tokens_to_ids(token)
        pipe.text_encoder.get_input_embeddings().weight.data[number] = rows[0].float()
    return pipe


def draw(pipe: StableDiffusionPipeline, prompt: str = PROMPT) -> torch.Tensor:
    """(64, 64, 3) in 0 … 1."""
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompt, num_inference_steps=4, generator=generator, output_type="pt").images
    return images[0].permute(1, 2, 0)


# What a user's program is: no module of this project but where its base lies. {code} is the card's own, as it stands.
PROGRAM = """
import sys, torch
{code}
pipe.set_progress_bar_config(disable=True)
image = pipe({prompt!r}, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images[0]
from safetensors.torch import save_file
save_file({{"image": image.permute(1, 2, 0).contiguous()}}, {out!r})
ours = [m for m in sys.modules if m.split(".")[0] in ("pipeline", "training", "retrieval", "ray_jobs")]
assert set(ours) <= {{"pipeline", "pipeline.miniature"}}, ours
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "tolerance"), [("LoRA", 1e-4), ("Custom Diffusion", 5e-3)])
def test_a_fresh_process_with_diffusers_alone_draws_the_same(
    way: str,
    tolerance: float,
    release: Path,
    pipe: StableDiffusionPipeline,
    merged: MergedModel,
    tmp_path: Path,
) -> None:
    """Worst pixel, of a range of 1. LoRA: float32 rounding (5e-6 seen). Custom Diffusion: W_0 + delta is rounded to
    float16 in the file, and its attention is another kernel (4e-4 seen)."""
    card = (release / "README.md").read_text()
    section = card.split(f"### As {'a LoRA' if way == 'LoRA' else 'Custom Diffusion weights'}")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    downloaded, out = shutil.copytree(release, tmp_path / "downloaded"), tmp_path / "image.safetensors"
    program = PROGRAM.format(code=code, prompt=PROMPT, out=str(out))
    done = subprocess.run([sys.executable, "-c", program], cwd=downloaded, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Image.open(downloaded / "image.png").size == (64, 64)
    image = load_file(out)["image"]
    ours = draw(applied(merged))
    assert (image - ours).abs().max() < tolerance
    # and the weights matter: the base's picture is far away (the token is no word of its vocabulary)
    assert (ours - draw(pipe)).abs().mean() > 0.05
    tokens_only = applied(MergedModel({}, {}, merged.tokens))
    assert (ours - draw(tokens_only)).abs().mean() > 0.05


def test_files(release: Path, merged: MergedModel, pipe: StableDiffusionPipeline) -> None:
    found = {p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_file()}
    assert found == {
        "README.md",
        "samples.png",
        "merged.safetensors",
        "pytorch_custom_diffusion_weights.safetensors",
        "pytorch_lora_weights.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pets-new1.safetensors",
        "pets-a_b.safetensors",
        "comfyui/pets.safetensors",
        "comfyui/embeddings/pets-new1.safetensors",
        "comfyui/embeddings/pets-a_b.safetensors",
    }
    layer = merged.layers[0]
    left, right = merged.factors(layer)
    lora = load_file(release / "pytorch_lora_weights.safetensors")
    assert torch.equal(lora[f"unet.{layer}.lora_A.weight"], right)
    assert torch.equal(lora[f"unet.{layer}.lora_B.weight"], left)
    kohya = load_file(release / "comfyui/pets.safetensors")
    key = f"lora_unet_{layer.replace('.', '_')}"
    assert torch.equal(kohya[f"{key}.lora_down.weight"], right)
    assert torch.equal(kohya[f"{key}.lora_up.weight"], left)
    assert kohya[f"{key}.alpha"] == 5
    row = merged.tokens["<new1>"][0]
    assert torch.equal(load_file(release / "pets-new1.safetensors")["<new1>"], row)
    assert torch.equal(load_file(release / "comfyui/embeddings/pets-new1.safetensors")["emb_params"], row[None])
    dense = load_file(release / "pytorch_custom_diffusion_weights.safetensors")
    attention, _, part = layer.rpartition(".")
    weight = pipe.unet.get_submodule(layer).weight.detach() + merged.deltas[layer]
    assert torch.equal(dense[f"{attention}.processor.{part}_custom_diffusion.weight"], weight.half())
    assert MergedModel.load(release / "merged.safetensors").metadata["concepts"] == ["cat"]


def test_the_card(release: Path) -> None:
    card = (release / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-to-image"
    assert front["license"] == "other"
    assert front["instance_prompt"].startswith("photo of a <new1> cat, photo of a <a|b> ")
    assert "base_model" not in front  # the embedded one is no name of the hub
    rows = [line for line in card.split("## In diffusers")[0].splitlines() if line.startswith("| ")]
    assert rows[2] == "| tom | <code>&lt;new1&gt; cat</code> | cat | 0.750 | 1.0e-06 |"
    assert all(row.count("|") == 6 for row in rows)
    assert "![samples of every concept](samples.png)" in card
    assert "{{" not in card and "{%" not in card


def test_the_card_says_what_to_type(release: Path) -> None:
    card = (release / "README.md").read_text()
    assert "| <code>&lt;new1&gt;</code> | `embedding:pets-new1` | `pets-new1` |" in card
    assert "<code>photo of a pets-new1 cat &lt;lora:pets:1&gt;</code> in A1111" in card
    assert f"transformers {transformers.__version__}" in card


@pytest.mark.parametrize(
    ("base", "code"),
    [
        ("miniature", 'BASE = files("pipeline.miniature") / "model"\n'),
        ("owner/model", "BASE = 'owner/model'\n"),
        ("/home/anna/secret/sd15", "BASE = 'sd15'  # where you have"),
        ("./secret/sd15/", "BASE = 'sd15'  # where you have"),
        ("..\\secret\\sd15", "BASE = 'sd15'  # where you have"),
        ("secret", "BASE = 'secret'  # where you have"),
    ],
)
def test_the_card_names_the_base_and_not_where_it_lay(base: str, code: str, tmp_path: Path) -> None:
    card = write_card(tmp_path, [CardConcept("a", "<a>", "cat")], name="a", base_model=base).read_text()
    assert code in card and "anna" not in card and (base == "secret" or "secret" not in card)
    for block in re.findall(r"```python\n(.*?)```", card, re.S):
        compile(block, "card", "exec")
    assert yaml.safe_load(card.split("---")[1]).get("base_model") == (base if base == "owner/model" else None)


def test_what_people_type_stays_text_in_the_card(tmp_path: Path) -> None:
    evil = "x<script>|`[a](javascript:b)\n---\n# \x1b[31mtitle"
    for licence in (
        {"license": evil},
        {"license_name": evil, "license_link": evil},
        {"license_link": 'https://a/"><b>'},
    ):
        concepts = [CardConcept("a", "<a>", evil)]
        card = write_card(tmp_path, concepts, name="a", base_model=f"/{evil}", **licence).read_text()
        front = card.split("---\n")[1]
        assert yaml.safe_load(front)["pipeline_tag"] == "text-to-image"
        page = re.sub(r"```python\n.*?```", "", card[len(front) + 8 :], flags=re.S)
        assert not re.search(r"<script|<b>|\]\(javascript|\x1b|^# .*title", page, re.M)
    card = write_card(
        tmp_path, concepts, name="a", base_model="x/y", license_name="Ours", license_link="https://a/b?c&d"
    )
    assert 'Licence of these weights: <a href="https://a/b?c&amp;d">Ours</a>.' in card.read_text()


def test_the_card_needs_its_picture_and_concepts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such picture"):
        write_card(tmp_path, [CardConcept("a", "<a>", "cat")], name="a", base_model="x/y", grid="absent.png")
    with pytest.raises(ValueError, match="at least one concept"):
        write_card(tmp_path, [], name="a", base_model="x/y")
    card = write_card(tmp_path, [CardConcept("a", "<a>", "cat")], name="a", base_model="x/y", license="mit")
    front = yaml.safe_load(card.read_text().split("---")[1])
    assert (front["base_model"], front["license"]) == ("x/y", "mit")


def test_ranks_that_differ_from_layer_to_layer(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    merged = merged_for(pipe, shared=False)
    write_formats(merged, pipe, tmp_path, "pets")  # its load-back compares every layer's change, scale included
    # and without the ranks in the file's metadata
    save_file(load_file(tmp_path / LORA), tmp_path / "bare.safetensors")
    check_lora(merged, pipe, tmp_path / "bare.safetensors")
    kohya = load_file(tmp_path / "comfyui" / "pets.safetensors")
    assert {v.item() for k, v in kohya.items() if k.endswith(".alpha")} == {4.0}


def test_a_change_of_a_few_layers(pipe: StableDiffusionPipeline, merged: MergedModel, tmp_path: Path) -> None:
    layer = merged.layers[0]
    few = MergedModel({layer: merged.left[layer]}, merged.right, {})
    write_formats(few, pipe, tmp_path, "pets")
    assert len(load_file(tmp_path / LORA)) == 2


def test_another_base_is_refused(pipe: StableDiffusionPipeline, merged: MergedModel, tmp_path: Path) -> None:
    layer = merged.layers[0]

    def refused(match: str, **changes: object) -> None:
        parts = {"left": merged.left, "right": merged.right, "tokens": merged.tokens} | changes
        with pytest.raises(ValueError, match=match):
            write_formats(MergedModel(**parts), pipe, tmp_path, "pets")

    refused("changes no layer", left={})
    refused("not in the base", left={"down_blocks.9.to_k": merged.left[layer]})
    refused("trained on another base", left={layer: merged.left[layer][:-1]})
    refused("trained on another base", right={SHARED: merged.right[SHARED][:, :-1]})
    refused("NaN", left={layer: merged.left[layer] * torch.nan})
    refused("in the base's vocabulary", tokens={"cat</w>": merged.tokens["<new1>"]})
    refused("text encoders", tokens={"<new1>": merged.tokens["<new1>"] * 2})
    refused("has a row of", tokens={"<new1>": [torch.zeros(3)]})
    with pytest.raises(ValueError, match="expected letters"):
        write_formats(merged, pipe, tmp_path, "../x")
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_arrive_are_found(
    pipe: StableDiffusionPipeline, merged: MergedModel, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = load_file(release / LORA)
    some = tmp_path / "some.safetensors"
    save_file({k: v for k, v in lora.items() if merged.layers[0] not in k}, some)
    with pytest.raises(RuntimeError, match="did not arrive"):
        check_lora(merged, pipe, some)
    save_file({k: v * 2 if "lora_B" in k else v for k, v in lora.items()}, some)
    with pytest.raises(RuntimeError, match="wrong scale"):
        check_lora(merged, pipe, some)
    # diffusers without `_pipeline`: reads the file, installs nothing (diffusers#9320)
    load = pipe.unet.load_attn_procs
    monkeypatch.setattr(pipe.unet, "load_attn_procs", lambda *a, _pipeline, **k: load(*a, **k))
    with pytest.raises(RuntimeError, match="did not arrive"):
        write_custom_diffusion(merged, pipe, tmp_path, "one")


def test_file_names() -> None:
    tokens = ["<new1>", "<our-cat>", "cat", "<CAT>", "../x", "a/b", "a\\b", ".hidden", "merged", "é" * 200, "<>", "AND"]
    tokens += ["pytorch_lora_weights", "x" * 300]
    files = token_files(tokens, "pets")
    assert (files["<new1>"], files["<our-cat>"]) == ("pets-new1.safetensors", "pets-our_cat.safetensors")
    assert len(set(files.values())) == len(tokens)
    # legal everywhere, of one case, no word, nothing that a prompt's syntax has a use for
    assert all(re.fullmatch(r"pets-[a-z0-9_]+\.safetensors", f) and len(f) < 120 for f in files.values())
    assert not any(f.endswith("pytorch_lora_weights.safetensors") for f in files.values())
    # no two batches share one
    assert not set(files.values()) & set(token_files(tokens, "pets-our").values())
    assert token_files(["<b-c>"], "a") != token_files(["<c>"], "a-b")
    assert file_stem("v1.5-pets") == "v1.5-pets"
    for name in ("con", "NUL", "com1.x", "a" * 200):  # Windows' devices, and what is too long beside a suffix
        assert file_stem(name) != name and len(file_stem(name)) < 100
        assert not RESERVED.fullmatch(file_stem(name)) and file_stem(file_stem(name)) == file_stem(name)


# What transformers 4 calls the weights of a CLIP text model; 5 takes these, too.
TRANSFORMERS_4 = {
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.final_layer_norm.weight",
    "text_model.final_layer_norm.bias",
    *(
        f"text_model.encoder.layers.0.{module}.{kind}"
        for kind in ("weight", "bias")
        for module in (
            "layer_norm1",
            "layer_norm2",
            "mlp.fc1",
            "mlp.fc2",
            "self_attn.k_proj",
            "self_attn.out_proj",
            "self_attn.q_proj",
            "self_attn.v_proj",
        )
    ),
}


def test_text_encoders_have_the_keys_that_both_versions_of_transformers_load(tmp_path: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=4
    )
    for model, more in ((CLIPTextModel, set()), (CLIPTextModelWithProjection, {"text_projection.weight"})):
        encoder, folder = model(config), tmp_path / model.__name__
        save_text_encoder(encoder, folder)
        assert set(load_file(folder / "model.safetensors")) == TRANSFORMERS_4 | more
        arrived = model.from_pretrained(folder).state_dict()
        assert all(torch.equal(arrived[key], tensor) for key, tensor in encoder.state_dict().items())
    embedded = load_file(MINIATURE / "text_encoder/model.safetensors")
    assert {re.sub(r"layers\.\d+", "layers.0", key) for key in embedded} == TRANSFORMERS_4
    # what its `CLIPTokenizer` asks for
    assert {"vocab.json", "merges.txt"} < {path.name for path in (MINIATURE / "tokenizer").iterdir()}


# Where Stable Diffusion XL's blocks stand in Stability's code, and how many transformer blocks each has.
STABILITY = {
    "down_blocks.1.attentions.0": ("input_blocks_4_1", 2),
    "down_blocks.1.attentions.1": ("input_blocks_5_1", 2),
    "down_blocks.2.attentions.0": ("input_blocks_7_1", 10),
    "down_blocks.2.attentions.1": ("input_blocks_8_1", 10),
    "mid_block.attentions.0": ("middle_block_1", 10),
    "up_blocks.0.attentions.0": ("output_blocks_0_1", 10),
    "up_blocks.0.attentions.1": ("output_blocks_1_1", 10),
    "up_blocks.0.attentions.2": ("output_blocks_2_1", 10),
    "up_blocks.1.attentions.0": ("output_blocks_3_1", 2),
    "up_blocks.1.attentions.1": ("output_blocks_4_1", 2),
    "up_blocks.1.attentions.2": ("output_blocks_5_1", 2),
}


def test_the_names_of_sdxl_s_layers() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
        )
    expected = {
        f"{ours}.transformer_blocks.{i}.attn2.{part}": f"lora_unet_{theirs}_transformer_blocks_{i}_attn2_{part}"
        for ours, (theirs, count) in STABILITY.items()
        for i in range(count)
        for part in ("to_k", "to_v")
    }
    assert len(expected) == 140
    assert {layer: kohya_name(layer, unet.config) for layer in text_kv_layers(unet)} == expected


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("width", "embedding", "prediction", "version", "v2", "architecture"),
    [
        (768, None, "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora"),
        (1024, None, "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        (1024, None, "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        (2048, "text_time", "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_lora_says_what_it_is_for(
    width: int, embedding: str | None, prediction: str, version: str, v2: str, architecture: str
) -> None:
    pipe = SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width, addition_embed_type=embedding)),
        scheduler=SimpleNamespace(config=SimpleNamespace(prediction_type=prediction)),
    )
    found = kohya_metadata(pipe, "pets", 5)
    assert (found["ss_base_model_version"], found["ss_v2"], found["ss_output_name"]) == (version, v2, "pets")
    assert (found["modelspec.architecture"], found["ss_network_dim"]) == (architecture, "5")


def test_equal_weights_make_equal_files(
    release: Path, pipe: StableDiffusionPipeline, merged: MergedModel, tmp_path: Path
) -> None:
    write_formats(merged, pipe, tmp_path / "again", "pets")
    for path in (tmp_path / "again").rglob("*.*"):
        assert path.read_bytes() == (release / path.relative_to(tmp_path / "again")).read_bytes(), path.name
    metadata = {f"key {i}": f'ä "{i}" \n\x01\x7f' for i in range(20)}
    for i in range(3):
        save_tensors(tmp_path / f"{i}", {"a": torch.ones(2)}, dict(reversed(metadata.items())) if i else metadata)
    assert metadata_of(tmp_path / "0") == metadata and torch.equal(load_file(tmp_path / "0")["a"], torch.ones(2))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_many_tokens_are_checked_at_once(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    merged = merged_for(pipe, tokens=tuple(f"<new{i}>" for i in range(200)))
    resized = []
    resize = type(pipe.text_encoder).resize_token_embeddings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(pipe.text_encoder),
            "resize_token_embeddings",
            lambda self, *args, **kwargs: resized.append(args) or resize(self, *args, **kwargs),
        )
        assert len(write_tokens(merged, pipe, tmp_path, "pets")) == 400
    assert len(resized) == 1


def test_sdxl(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Two text encoders, a token has a row in each; the card's loop gives both their rows."""
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(pipe.tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            projection_dim=32,
            bos_token_id=pipe.tokenizer.bos_token_id,
            eos_token_id=pipe.tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=192 + 64,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    xl = StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=copy.deepcopy(pipe.text_encoder),
        text_encoder_2=second,
        tokenizer=copy.deepcopy(pipe.tokenizer),
        tokenizer_2=copy.deepcopy(pipe.tokenizer),
        unet=unet,
        scheduler=pipe.scheduler,
    )
    merged = merged_for(xl)
    write_formats(merged, xl, tmp_path, "concepts")
    found = metadata_of(tmp_path / "comfyui/concepts.safetensors")
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k.alpha" in load_file(
        tmp_path / "comfyui/concepts.safetensors"
    )
    first, other = merged.tokens["<new1>"]
    file = load_file(tmp_path / "concepts-new1.safetensors")
    assert torch.equal(file["clip_l"], first[None]) and torch.equal(file["clip_g"], other[None])
    concepts = [CardConcept("a", t, "cat") for t in merged.tokens]
    card = write_card(tmp_path, concepts, name="concepts", base_model="x/y", two_encoders=True).read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    loop = re.search(r"words = .*?(?=\nimage)", code, re.S)[0]
    exec(loop, {"pipe": xl, "load_file": load_file, "RELEASE": str(tmp_path)})
    for index, (tokenizer, encoder) in enumerate(
        [(xl.tokenizer, xl.text_encoder), (xl.tokenizer_2, xl.text_encoder_2)]
    ):
        number = tokenizer.convert_tokens_to_ids("<new1>")
        row = encoder.get_input_embeddings().weight[number]
        assert torch.equal(row, merged.tokens["<new1>"][index].float())
