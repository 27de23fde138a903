"""Types of a recipe's fields, with their ranges, and the base of its sections."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from treeq_export.ops import MAX_BITS, MIN_BITS

# Upper ends that no use comes near, so that every number fits what computes with it.
MAX_COUNT = 10_000_000
MAX_AXIS = 1 << 16
MAX_SAMPLER_STEPS = 1000  # of the schedules that models are trained with
MAX_SEED = 1 << 62  # offsets are added, and generators take 64 bits
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Axis = Annotated[int, Field(ge=1, le=MAX_AXIS)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Threads = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Rate = Annotated[float, Field(gt=0, le=1e6, strict=False)]
AverageBits = Annotated[float, Field(ge=MIN_BITS, le=MAX_BITS, strict=False)]


class Section(BaseModel):
    """Base of all sections: strict types, finite numbers, no unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
