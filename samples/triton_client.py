"""An image from a Triton server in a few lines: needs tritonclient, numpy and pillow only.

    pip install 'tritonclient[http,grpc]' pillow
    python samples/triton_client.py --url localhost:8000 --label 7 --seed 1 --out seven.png
    python samples/triton_client.py --url localhost:8001 --grpc --label 7 --seed 1 --out seven.png

The server is one that `treeq-export serve` has written the repository of, for a class-conditional
model that gives pictures; `treeq-export client` is the complete client.
"""

import argparse
import importlib
import sys
import time
from typing import Any

import numpy as np
from PIL import Image
from tritonclient.utils import InferenceServerException


def ask(url: str, protocol: str, label: int, seed: int, steps: int | None) -> dict[str, Any]:
    """Return the image and how many steps it took.

    Args:
        url: host:port of the protocol.
        protocol: "http" or "grpc"; both modules have the same interface.
        label: The class.
        seed: Seed of the noise: equal seeds give equal images.
        steps: Solver steps; None is the server's default.

    Returns:
        image (1, H, W, C) uint8 and step (1, 1) int32.
    """
    triton = importlib.import_module(f"tritonclient.{protocol}")
    values = {"label": np.array([[label]], np.int32), "seed": np.array([[seed]], np.int64)}
    if steps is not None:
        values["steps"] = np.array([[steps]], np.int32)
    inputs = []
    for name, value in values.items():
        kind = "INT64" if value.dtype == np.int64 else "INT32"
        inputs.append(triton.InferInput(name, value.shape, kind))
        inputs[-1].set_data_from_numpy(value)
    names = ("image", "step")
    outputs = [triton.InferRequestedOutput(name) for name in names]
    with triton.InferenceServerClient(url) as client:
        result = client.infer("sampler", inputs, outputs=outputs)
    return {name: result.as_numpy(name) for name in names}


def main() -> None:
    """Ask for one image and write it, each pixel as a square."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--grpc", action="store_true")
    parser.add_argument("--label", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    protocol = "grpc" if options.grpc else "http"
    start = time.perf_counter()
    try:
        got = ask(options.url, protocol, options.label, options.seed, options.steps)
    except (InferenceServerException, OSError) as error:
        sys.exit(f"{options.url}: {error}")
    took_ms = (time.perf_counter() - start) * 1e3
    pixels = got["image"][0]
    scale = max(1, 256 // min(pixels.shape[:2]))
    large = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(large[..., 0] if large.shape[2] == 1 else large).save(options.out)
    print(f"{options.out}: label {options.label}, {got['step'][0, 0]} steps, {took_ms:.1f} ms")


if __name__ == "__main__":
    main()
