"""Render the sprite atlas from the icon sets: `npm install` the @iconify-json packages, then

    python -m pipeline.miniature.make_atlas path/to/node_modules/@iconify-json

Needs `resvg-py`. Only developers who change the world's classes or styles run this; the atlas is in the package.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import resvg_py
from PIL import Image

from pipeline.miniature.world import ATLAS, CLASSES, HELD_OUT_STYLES, TRAINING_STYLES

SIDE = 88


def _sprite(icons: dict, name: str) -> Image.Image | None:
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    if name not in icons["icons"]:
        return None
    icon = icons["icons"][name]
    box = [icon.get(k, icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def main(root: Path) -> None:
    styles = TRAINING_STYLES + HELD_OUT_STYLES
    sheet = Image.new("RGBA", (SIDE * len(CLASSES), SIDE * len(styles)))
    sprites: dict[str, list[str]] = {}
    credits = [
        "# The sprites",
        "",
        "Rendered to small pictures from these icon sets; shapes and colours unchanged.",
        "",
    ]
    for row, style in enumerate(styles):
        icons = json.loads((root / style / "icons.json").read_text())
        info = json.loads((root / style / "info.json").read_text())
        sprites[style] = []
        for column, (cls, name) in enumerate(CLASSES.items()):
            art = _sprite(icons, name)
            if art is not None:
                sheet.paste(art, (column * SIDE, row * SIDE))
                sprites[style].append(cls)
        licence, author = info["license"], info["author"]
        credits.append(
            f"- `{style}`: {info['name']} by {author['name']} ({author.get('url', '')}), "
            f"{licence['spdx']} ({licence.get('url', '')}), {len(sprites[style])} pictures"
        )
    ATLAS.mkdir(exist_ok=True)
    sheet.save(ATLAS / "atlas.png", optimize=True)
    index = {"side": SIDE, "styles": styles, "classes": list(CLASSES), "sprites": sprites}
    (ATLAS / "atlas.json").write_text(json.dumps(index, indent=1))
    (ATLAS / "ATTRIBUTION.md").write_text("\n".join(credits) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
