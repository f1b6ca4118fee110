"""Names in tables of scores. In a module of its own, which needs no PyTorch."""

NOT_MEASURED = {"model", "prompt", "seed", "plain", "samples", "concept", "table", "variant", "image_seed"}
"""Columns that are no measures."""

MEASURED = {"text", "image", "identity", "retention", "presence", "kid", "drift", "moongate", "diversity"}
"""Measures that are there without a judge of one's own."""
