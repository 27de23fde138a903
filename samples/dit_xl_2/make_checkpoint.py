"""Write a DiT-XL/2 checkpoint with random weights: its size and shapes, not its images.

`python samples/dit_xl_2/make_checkpoint.py --out runs/dit_xl_2_random` writes config.json and
diffusion_pytorch_model.safetensors (float16, 1.5 GB) in diffusers layout, always the same bytes.
Time and memory of every stage are those of the published network; image quality means nothing.
As in the published checkpoint, every block holds a copy of the same timestep and class embedder.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

CONFIG: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description="Write DiT-XL/2 with random weights.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=CONFIG["num_layers"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    model = DiTTransformer2DModel(**CONFIG | {"num_layers": arguments.layers})
    embedders = [
        model.get_submodule(f"transformer_blocks.{i}.norm1.emb") for i in range(arguments.layers)
    ]
    for embedder in embedders[1:]:
        embedder.load_state_dict(embedders[0].state_dict())
    model.save_pretrained(arguments.out, max_shard_size="100GB")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {arguments.out}: {num_parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
