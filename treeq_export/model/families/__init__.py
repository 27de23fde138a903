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
    """Return the family of a config.json's _class_name and norm_type; None where there is none."""
    is_legacy = class_name == _LEGACY_CLASS
    for family in FAMILIES:
        if (
            norm_type == family.legacy_norm_type
            if is_legacy
            else class_name == family.diffusers_class
        ):
            return family
    return None
