"""The families of denoisers. Another one is a file beside this one and a line in FAMILIES."""

from treeq_export.model.families.dit import DiTDenoiser
from treeq_export.model.families.flux import FluxDenoiser
from treeq_export.model.families.pixart import PixArtDenoiser
from treeq_export.model.families.sd3 import SD3Denoiser
from treeq_export.model.zoo import Denoiser

FAMILIES: tuple[type[Denoiser], ...] = (DiTDenoiser, PixArtDenoiser, SD3Denoiser, FluxDenoiser)
CLASS_NAMES = tuple(family.diffusers_class for family in FAMILIES)
# Published DiT and PixArt checkpoints still name the class that diffusers split in two.
_LEGACY_CLASS = "Transformer2DModel"


def find_family(class_name: str, norm_type: str) -> type[Denoiser] | None:
    """Return the family of a diffusers class; None where there is none.

    Args:
        class_name: The _class_name of a config.json.
        norm_type: The norm_type there, which tells the models of the older class apart.
    """
    for family in FAMILIES:
        if class_name == family.diffusers_class:
            return family
        if (class_name, norm_type) == (_LEGACY_CLASS, family.legacy_norm_type):
            return family
    return None
