"""The evaluate stage: image quality of the quantized model beside full precision.

Both sample from equal noise and equal conditioning. Our own full-precision row is always measured
with the same seeds, and paired PSNR stands beside the Frechet distance, which can improve by
chance under damage.
"""

from treeq_export.evaluate.stage import run_evaluate

__all__ = ["run_evaluate"]
