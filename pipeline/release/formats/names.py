"""Names of files that leave for other programs and systems."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

LONGEST = 80
"""Letters of a name within a file's name."""
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""What Windows takes for a device, whatever the suffix."""
LORA = "pytorch_lora_weights.safetensors"
"""The file that `load_lora_weights(folder)` looks for."""
COMFYUI = "comfyui"
"""Folder of the files for ComfyUI, A1111 and kin."""


def file_stem(name: str) -> str:
    """A batch's name as part of a file's name: the same, unless some system refuses it or takes it for a device; then
    with a hash. Raises: ValueError for a name that is no batch's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name {name!r}: expected letters, digits, '.', '_' and '-', a letter or digit first")
    if len(name) <= LONGEST and not RESERVED.fullmatch(name):
        return name
    return f"{name[: LONGEST - 9].replace('.', '_')}_{_short_hash(name)}"


def token_files(tokens: Iterable[str], name: str) -> dict[str, str]:
    """File of each token, `<batch>-<token>.safetensors`: `<our-cat>` of the batch `pets` -> `pets-our_cat.safetensors`.

    Outside of diffusers a token goes by its file's name, wherever that stands in a prompt, and the files of all batches
    lie in one folder. Hence a name that is no word, that two batches do not share (the last `-` ends the batch's name),
    that every system takes, and without what programs read as syntax, like `<` and `AND`. Where nothing is left of a
    token, or two have the same left, a hash is appended.
    """
    plain = {token: re.sub(r"[^a-z0-9]+", "_", token.lower()).strip("_")[:LONGEST] for token in tokens}
    counts = Counter(plain.values())
    files = {}
    for token, word in plain.items():
        # `load_lora_weights(folder)` takes any file whose name ends like the LoRA's
        if not word or counts[word] > 1 or word.endswith(LORA.removesuffix(".safetensors")):
            word = f"{word}_{_short_hash(token)}".lstrip("_")
        files[token] = f"{file_stem(name)}-{word}.safetensors"
    return files


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
