"""Train the Diffusion Transformer and the classifier of the digits sample from scratch.

Data: the 1797 real 8x8 images of scikit-learn's ``load_digits``, scaled to [-1, 1]; the first 1500
of a seeded permutation train both networks, the other 297 measure the classifier.

Model: ``DiTTransformer2DModel`` (6 blocks, width 128, patch 2, 2.1 M parameters), trained as a
rectified flow: x_t = (1 - t) x + t n, target n - x, t ~ logit-normal, timestep = 1000 t.
One label in ten is dropped to the null class 10 for classifier-free guidance.

Writes, beside this file:
    checkpoint/               config.json + diffusion_pytorch_model.safetensors (fp16)
    classifier.onnx           images -> logits, features (48)
    reference.safetensors     mean and covariance of the training images' features, float64

Run ``python samples/digits/train.py``: about 15 minutes on two cores. Seeds are fixed.
"""

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
NULL_CLASS = 10
NUM_TRAIN = 1500
CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 32,
}


class Classifier(nn.Module):
    """A small convolutional classifier; its 48 features carry the Frechet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 48),
            nn.ReLU(),
        )
        self.head = nn.Linear(48, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (n, 10) and features (n, 48) of images (n, 1, 8, 8) in [-1, 1]."""
        features = self.features(images)
        return self.head(features), features


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (1797, 1, 8, 8) in [-1, 1] and labels, in a seeded order."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def train_classifier(images: torch.Tensor, labels: torch.Tensor) -> Classifier:
    """Train 40 epochs with additive noise 0.1 and label smoothing 0.05."""
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(40):
        for index in torch.randperm(len(images)).split(100):
            noisy = images[index] + 0.1 * torch.randn(len(index), 1, 8, 8)
            logits, _ = classifier(noisy)
            loss = functional.cross_entropy(logits, labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()


def make_model() -> DiTTransformer2DModel:
    """Return the untrained model: adaLN and output start at zero; the caller drops labels."""
    model = DiTTransformer2DModel(**CONFIG)
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            vars(module)["dropout_prob"] = 0.0  # each block would drop its own labels otherwise
    for name, parameter in model.named_parameters():
        if "norm1.linear" in name or "proj_out_2" in name:
            nn.init.zeros_(parameter)
    return model


def train_model(images: torch.Tensor, labels: torch.Tensor, steps: int) -> DiTTransformer2DModel:
    """Train for a fixed number of steps and return the exponential moving average."""
    model = make_model().train()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = 1e-3 * min(1.0, step / 200) * (0.98 * cosine + 0.02)
        index = torch.randint(0, len(images), (128,))
        clean, label = images[index], labels[index].clone()
        label[torch.rand(128) < 0.1] = NULL_CLASS
        t = torch.sigmoid(torch.randn(128))
        noise = torch.randn_like(clean)
        mix = t[:, None, None, None]
        velocity = model(
            (1 - mix) * clean + mix * noise, timestep=t * 1000, class_labels=label
        ).sample
        loss = functional.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0:
            elapsed = time.monotonic() - started
            left = elapsed / step * (steps - step)
            loss_mean = np.mean(losses[-100:])
            print(f"step {step}/{steps} loss {loss_mean:.4f} {left:.0f} s left", flush=True)
    return average


def export_classifier(classifier: Classifier, path: Path) -> None:
    """Write the classifier as one ONNX file with a dynamic number of images."""
    program = torch.onnx.export(
        classifier,
        (torch.zeros(2, 1, 8, 8),),
        dynamo=True,
        opset_version=21,
        input_names=["images"],
        output_names=["logits", "features"],
        dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces hold local paths
    program.save(path, external_data=False)


@torch.no_grad()
def save_reference(classifier: Classifier, images: torch.Tensor, path: Path) -> None:
    """Write mean (48,) and covariance (48, 48) of the features of real images."""
    features = classifier(images)[1].double().numpy()
    save_file(
        {"mean": features.mean(0), "covariance": np.cov(features, rowvar=False)},
        path,
        metadata={"num_images": str(len(images)), "source": "sklearn.datasets.load_digits, train"},
    )


def main() -> None:
    """Train everything and write it beside this file."""
    parser = argparse.ArgumentParser(description="Train the digits sample from scratch.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    images, labels = load_images()
    classifier = train_classifier(images[:NUM_TRAIN], labels[:NUM_TRAIN])
    with torch.no_grad():
        predicted = classifier(images[NUM_TRAIN:])[0].argmax(1)
    accuracy = (predicted == labels[NUM_TRAIN:]).float().mean().item()
    print(f"classifier: {accuracy:.4f} of {len(predicted)} held-out images correct", flush=True)
    export_classifier(classifier, arguments.out / "classifier.onnx")
    save_reference(classifier, images[:NUM_TRAIN], arguments.out / "reference.safetensors")
    torch.manual_seed(0)
    model = train_model(images[:NUM_TRAIN], labels[:NUM_TRAIN], arguments.steps)
    model.half().save_pretrained(arguments.out / "checkpoint")


if __name__ == "__main__":
    main()
