"""Methods of teaching a concept: a declaration each, all trained by `training.loop.train`. See docs/methods.md."""

from training.methods.custom_diffusion import CUSTOM_DIFFUSION, CUSTOM_DIFFUSION_ALL, CUSTOM_DIFFUSION_CROSSATTN
from training.methods.dreambooth import DREAMBOOTH
from training.methods.method import Method
from training.methods.textual_inversion import TEXTUAL_INVERSION

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        CUSTOM_DIFFUSION,
        CUSTOM_DIFFUSION_CROSSATTN,
        CUSTOM_DIFFUSION_ALL,
        DREAMBOOTH,
        TEXTUAL_INVERSION,
    )
}
