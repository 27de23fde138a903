"""The plan: the only thing that the stages share.

Two files. `plan.json` holds the assignment, one entry per quantized linear in execution order;
`plan.safetensors` holds what calibration computed, under `<layer>.<tensor>`:

    codes             int8     (N, K)        q_w
    weight_scale      float32  (N, G)        s_w; G = 1 or K / group_size
    activation_step   float32  (1,)          step of the activation; absent where not quantized
    branch.R          float32  (b_in, K/b_in, b_out*r)
    branch.L          float32  (b_out, b_in*r, N/b_out)
    bias              float32  (N,)          optional: replaces the checkpoint's bias

Finetuning lays trained tensors over these: `finetuned.safetensors` holds them under the same names,
and `finetune.json` says which calibrated tensors they belong to (`base_tensors_sha256`) and which
file they are (`tensors_sha256`). The plan itself stays as calibration left it.

A plan belongs to one checkpoint (`checkpoint_sha256`) and names its tensors (`tensors_sha256`, null
before calibration). Saving the same plan gives the same bytes. Nothing executes on load.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from treeq_export.artefacts import atomic_path, sha256_of_file, write_bytes
from treeq_export.errors import PlanError
from treeq_export.ops import LayerFormat
from treeq_export.quant.spec import (
    ActivationFormat,
    BranchFormat,
    Spec,
    WeightFormat,
    check_branch,
    check_divides,
)
from treeq_export.reading import (
    load_safetensors,
    parse_json,
    parse_record,
    read_bytes,
    read_record,
)
from treeq_export.run_folder import RunFolder

FORMAT_VERSION = 1

Tensors = dict[str, NDArray[Any]]

_storage: Any = safetensors.numpy  # its annotations are incomplete


class ModelRecord(Spec):
    """What a plan knows about its model."""

    name: str
    class_name: str
    num_parameters: Annotated[int, Field(ge=0)]


class TreePath(Spec):
    """Place of a layer in the network's tree.

    Attributes:
        block: Number of the transformer block, in execution order.
        position: Name inside the block, such as "attn1.to_q".
        leaf: Number of the leaf; layers that read the same input (q, k, v) share one.
    """

    block: Annotated[int, Field(ge=0)]
    position: str
    leaf: Annotated[int, Field(ge=0)]


class LayerPlan(Spec):
    """The assignment of one linear layer."""

    name: str
    in_features: Annotated[int, Field(ge=1)]
    out_features: Annotated[int, Field(ge=1)]
    tree: TreePath
    weight: WeightFormat
    activation: ActivationFormat
    rotation_group: Annotated[int, Field(ge=1)] = 1
    branch: BranchFormat | None = None

    def check_shapes(self) -> None:
        """Check that group, rotation and branch fit the layer.

        Raises:
            FormatError: One does not.
        """
        k = self.in_features
        check_divides(self.name, "rotation_group", self.rotation_group, k, power=True)
        if self.weight.group_size is not None:
            check_divides(self.name, "group_size", self.weight.group_size, k, power=False)
        if self.branch is not None:
            check_branch(self.name, self.branch, k, self.out_features)

    @property
    def num_weights(self) -> int:
        """Number of quantized weights, N K."""
        return self.in_features * self.out_features

    def layer_format(self, step: float) -> LayerFormat:
        """Return what a kernel has to know of the layer.

        Args:
            step: The layer's activation step; 0 where activations are not quantized.
        """
        return LayerFormat(
            weight_bits=self.weight.bits,
            act_bits=self.activation.bits or 0,
            act_scale=self.activation.scale,
            act_step=step,
            rotation_group=self.rotation_group,
            group_size=self.weight.group_size or 0,
            in_features=self.in_features,
            out_features=self.out_features,
        )


class StrategyRecord(Spec):
    """Which search strategy made the plan, with its options."""

    name: str
    options: dict[str, Any]


class Plan(Spec):
    """The assignment of a whole network."""

    format_version: int
    model: ModelRecord
    checkpoint_sha256: str
    strategy: StrategyRecord
    layers: tuple[LayerPlan, ...] = Field(strict=False)
    tensors_sha256: str | None = None

    @property
    def average_weight_bits(self) -> float:
        """Mean weight bits, weighted by number of weights."""
        return self._average([layer.weight.bits for layer in self.layers])

    @property
    def average_activation_bits(self) -> float:
        """Mean activation bits, weighted by number of weights; 32 where not quantized."""
        return self._average([layer.activation.bits or 32 for layer in self.layers])

    @property
    def block_names(self) -> list[str]:
        """Module names of the transformer blocks that hold planned layers, in execution order."""
        names = [layer.name.removesuffix(f".{layer.tree.position}") for layer in self.layers]
        return list(dict.fromkeys(names))

    @property
    def branch_parameter_fraction(self) -> float:
        """Parameters of all branches over the number of quantized weights."""
        total = sum(
            layer.branch.num_parameters(layer.in_features, layer.out_features)
            for layer in self.layers
            if layer.branch is not None
        )
        return total / max(sum(layer.num_weights for layer in self.layers), 1)

    def layer(self, name: str) -> LayerPlan:
        """Return the entry of one layer.

        Raises:
            PlanError: The plan has no such layer.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PlanError(f"{name}: not in the plan of {len(self.layers)} layers.")

    def _average(self, bits: list[int]) -> float:
        weights = [layer.num_weights for layer in self.layers]
        weighted = sum(b * n for b, n in zip(bits, weights, strict=True))
        return weighted / max(sum(weights), 1)


class _FinetuneDigests(BaseModel):
    """What finetune.json says of the tensors; records/plans.py has all of it."""

    base_tensors_sha256: str
    tensors_sha256: str


def plan_to_json(plan: Plan) -> str:
    """Return the canonical text of `plan.json`."""
    return json.dumps(plan.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def plan_digest(plan: Plan) -> str:
    """Return the hexadecimal SHA-256 of a plan's file."""
    return hashlib.sha256(plan_to_json(plan).encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of `plan.json`."""
    return Plan.model_json_schema()


def save_plan(folder: Path, plan: Plan, tensors: Mapping[str, NDArray[Any]] | None = None) -> Plan:
    """Write a plan, and its tensors where given; the JSON file comes last.

    Args:
        folder: The run folder.
        plan: The plan; its `tensors_sha256` is replaced.
        tensors: `<layer>.<tensor>` to array; None writes a plan that awaits calibration.

    Returns:
        The plan as saved.

    Raises:
        OutputError: The folder cannot be written to.
    """
    digest = None
    if tensors is not None:
        path = folder / RunFolder.TENSORS
        with atomic_path(path) as temporary:
            _storage.save_file(in_order(tensors), temporary)
        digest = sha256_of_file(path)
    saved = plan.model_copy(update={"tensors_sha256": digest})
    write_bytes(folder / RunFolder.PLAN, plan_to_json(saved).encode())
    return saved


def tensors_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the hexadecimal SHA-256 of the file that `save_plan` would write of tensors."""
    return hashlib.sha256(_storage.save(in_order(tensors))).hexdigest()


def in_order(tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """Return tensors by name, in name order and contiguous, as files hold them."""
    return {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}


def load_plan(folder: Path, checkpoint_sha256: str | None = None) -> Plan:
    """Read and check `plan.json`.

    Args:
        folder: The run folder.
        checkpoint_sha256: Digest of the checkpoint in use; None skips that check.

    Returns:
        The plan; every layer's shapes have been checked.

    Raises:
        PlanError: Missing, malformed, newer format, or of another checkpoint.
        FormatError: A group or rotation size does not fit its layer.
    """
    path = folder / RunFolder.PLAN
    if not path.is_file():
        raise PlanError(f"{path}: no plan. Run `treeq-export search --run {folder}` first.")
    again = f"Run `treeq-export search --run {folder}` again."
    data = read_bytes(path, error=PlanError, remedy=again)
    raw: Any = parse_json(data, path, error=PlanError, remedy=again)
    fields = cast(dict[str, Any], raw) if isinstance(raw, dict) else {}
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{path}: format_version {version}, expected {FORMAT_VERSION}. "
            "Install the treeq-export that wrote it, or search again with this one."
        )
    mend = "Mend it by the schema of `treeq-export inspect --schema`, or search again."
    plan = parse_record(data, Plan, path, error=PlanError, remedy=mend)
    if checkpoint_sha256 is not None and plan.checkpoint_sha256 != checkpoint_sha256:
        raise PlanError(
            f"{path}: belongs to checkpoint {plan.checkpoint_sha256[:12]}, "
            f"received {checkpoint_sha256[:12]}. Use its checkpoint, or another --out folder."
        )
    for layer in plan.layers:
        layer.check_shapes()
    return plan


def load_tensors(folder: Path, plan: Plan, *, finetuned: bool = True) -> Tensors:
    """Read `plan.safetensors` and what finetuning has laid over it, and check both.

    Args:
        folder: The run folder.
        plan: The plan of that folder.
        finetuned: Whether trained tensors, where there are any, replace the calibrated ones.

    Returns:
        `<layer>.<tensor>` to array.

    Raises:
        PlanError: Calibration has not run, or a file is not the one it should be.
    """
    path = folder / RunFolder.TENSORS
    if plan.tensors_sha256 is None or not path.is_file():
        raise PlanError(
            f"{path}: the plan has no scales and codes. "
            f"Run `treeq-export calibrate --run {folder}` first."
        )
    if sha256_of_file(path) != plan.tensors_sha256:
        raise PlanError(
            f"{path}: not the file that plan.json names. "
            f"Run `treeq-export calibrate --run {folder}` again."
        )
    tensors = _read_tensors(path, "Calibrate")
    for layer in plan.layers:
        _check_tensors(path, layer, tensors, "Calibrate")
    if finetuned and (folder / RunFolder.FINETUNE).is_file():
        _lay_over(folder, plan, tensors)
    return tensors


def _lay_over(folder: Path, plan: Plan, tensors: Tensors) -> None:
    """Replace calibrated tensors by the trained ones."""
    path, record = folder / RunFolder.FINETUNED, folder / RunFolder.FINETUNE
    remedy = f"Run `treeq-export finetune --run {folder}` again."
    made = read_record(record, _FinetuneDigests, error=PlanError, remedy=remedy)
    if made.base_tensors_sha256 != plan.tensors_sha256:
        raise PlanError(f"{record}: belongs to other calibrated tensors than plan.json. {remedy}")
    if not path.is_file() or sha256_of_file(path) != made.tensors_sha256:
        raise PlanError(f"{path}: not the file that {RunFolder.FINETUNE} names. {remedy}")
    tensors |= _read_tensors(path, "Finetune")
    for layer in plan.layers:
        _check_tensors(path, layer, tensors, "Finetune")


def _read_tensors(path: Path, what: str) -> Tensors:
    return load_safetensors(path, error=PlanError, remedy=f"{what} again.")


def _check_tensors(path: Path, layer: LayerPlan, tensors: Tensors, what: str) -> None:
    n, k = layer.out_features, layer.in_features
    groups = k // layer.weight.group_size if layer.weight.group_size else 1
    expected: dict[str, tuple[int, ...]] = {"codes": (n, k), "weight_scale": (n, groups)}
    if layer.activation.bits is not None:
        expected["activation_step"] = (1,)
    if layer.branch is not None:
        b_in, b_out, rank = layer.branch.b_in, layer.branch.b_out, layer.branch.rank
        expected["branch.R"] = (b_in, k // b_in, b_out * rank)
        expected["branch.L"] = (b_out, b_in * rank, n // b_out)
    if f"{layer.name}.bias" in tensors:
        expected["bias"] = (n,)
    for tensor, shape in expected.items():
        found = tensors.get(f"{layer.name}.{tensor}")
        if found is None or found.shape != shape:
            received = "nothing" if found is None else str(found.shape)
            raise PlanError(
                f"{path}: {layer.name}.{tensor}: received {received}, expected {shape}. "
                f"{what} again."
            )
