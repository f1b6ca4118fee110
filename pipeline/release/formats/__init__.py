"""What was trained in the formats that other programs load, each loaded back before it counts as written.

| file | taken by |
| --- | --- |
| `merged.safetensors` | this project: the factors, or the whole change, as they are |
| `pytorch_custom_diffusion_weights.safetensors` | `pipe.unet.load_attn_procs(…, _pipeline=pipe)`: dense W_0 + delta |
| `<batch>-<token>.safetensors` | `pipe.load_textual_inversion` |
| `pytorch_lora_weights.safetensors` | `pipe.load_lora_weights`: the factors, float16 |
| `adapter_config.json`, `adapter_model.safetensors` | `PeftModel.from_pretrained(pipe.unet, …)`: the same factors |
| `comfyui/<batch>.safetensors`, `comfyui/embeddings/` | ComfyUI, A1111 and kin: the LoRA in kohya's names, the tokens |
| `unet/`, `text_encoder/` | `from_pretrained(…, unet=…)`: whole parts, where more than text K/V layers changed |

Weights that silently do not load are the commonest complaint about files like these (diffusers#7261, #9320,
ComfyUI#1144). Hence the load-back with diffusers and peft: it raises RuntimeError if the layers or token rows that
arrive are not those that were written. Equal weights give equal files, byte for byte.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.merge.factors import MergedModel
from pipeline.release.formats import custom_diffusion, kohya, lora, peft_adapter, tokens
from pipeline.release.formats.exporter import Pipeline, check_fits, check_tokens_fit
from pipeline.release.formats.names import file_stem
from pipeline.release.formats.whole import write_parts
from training.backbone import Backbone
from training.weights import ConceptWeights

MERGED = "merged.safetensors"
EXPORTERS = (lora.EXPORTER, custom_diffusion.EXPORTER, tokens.EXPORTER, peft_adapter.EXPORTER, kohya.EXPORTER)
"""All formats of a merged model, in the order in which the card shows how to load them."""


def write_formats(merged: MergedModel, pipe: Pipeline, folder: Path, name: str) -> list[Path]:
    """Write every format into `folder`, and check each by loading it back over the base.

    Args:
        merged: the factors and token rows.
        pipe: the untouched base, a Stable Diffusion 1.x, 2.x or XL pipeline; as before when this returns.
        name: of the batch; letters, digits, `.`, `_` and `-`. Files that people put together with those of other
            batches are named after it.

    Returns:
        the files written.

    Raises:
        ValueError: the merged model does not belong to this base (layer, shape, token known already), or is unsafe; a
            name of other characters.
        RuntimeError: a file was written but does not arrive when loaded back.
    """
    check_fits(merged, pipe)
    file_stem(name)
    path = folder / MERGED
    merged.save(path)
    return [path, *(file for exporter in EXPORTERS for file in exporter.write(merged, pipe, folder, name))]


def write_whole(weights: ConceptWeights, backbone: Backbone, folder: Path, name: str) -> list[Path]:
    """Write weights that have no low-rank form, and check each file by loading it back: the parts of the model that
    changed, whole (`unet/`, `text_encoder/`, float16), and the tokens. Arguments, returns and errors as of
    `write_formats`.
    """
    check_tokens_fit(weights, backbone.pipe)
    file_stem(name)
    path = folder / MERGED
    weights.save(path)
    return [
        path,
        *tokens.write_tokens(weights, backbone.pipe, folder, name),
        *write_parts(weights, backbone, folder),
    ]
