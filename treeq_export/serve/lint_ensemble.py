"""Rules about ensembles, after Triton's own (core: `ValidateEnsembleConfig` and around it)."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from treeq_export.serve.lint_read import Config, Remarks, enum_name, shape_of

_NOT_OF_AN_ENSEMBLE = ("instance_group", "optimization", "model_warmup")


class _Tensor(NamedTuple):
    """A tensor of the ensemble, and who says what it is."""

    source: str
    data_type: str
    dims: list[int]
    batched: bool

    @property
    def full_dims(self) -> list[int]:
        return [-1, *self.dims] if self.batched else self.dims


def _steps(config: Config) -> Iterator[tuple[str, Any]]:
    for index, step in enumerate(config.message.ensemble_scheduling.step):
        yield f'step {index} ("{step.model_name}")', step


def _known_steps(config: Config) -> Iterator[tuple[str, Any, Config]]:
    """Yield the steps whose model is in the repository and could be parsed."""
    for where, step in _steps(config):
        sibling = None if step.model_namespace else config.sibling(step.model_name)
        if sibling is not None:
            yield where, step, sibling


def ensemble_form(config: Config) -> Remarks:
    """An ensemble has steps and nothing that belongs to a model that computes."""
    message = config.message
    has_steps = message.HasField("ensemble_scheduling")
    if has_steps != (message.platform == "ensemble"):
        received = "ensemble_scheduling" if has_steps else 'platform "ensemble"'
        other = 'platform: "ensemble"' if has_steps else "ensemble_scheduling"
        yield config.remark(
            f"{received}: received it alone, expected {other} with it. Write both, or neither."
        )
        return
    if not has_steps:
        return
    for name in _NOT_OF_AN_ENSEMBLE:
        if any(descriptor.name == name for descriptor, _ in message.ListFields()):
            yield config.remark(
                f"{name}: received it for an ensemble, expected none: the server refuses it. "
                "Remove it."
            )
    if not message.ensemble_scheduling.step:
        yield config.remark("ensemble_scheduling: received no step, expected some. Write steps.")


def ensemble_models(config: Config) -> Remarks:
    """Steps name models and versions that are there, and what goes in and out."""
    for where, step in _steps(config):
        for name in ("model_name", "input_map", "output_map"):
            if not getattr(step, name):
                yield config.remark(f"{where}: received no {name}, expected one. Write it.")
        folders = config.folder.repository.folders
        if step.model_name and not step.model_namespace and step.model_name not in folders:
            yield config.remark(
                f"{where}: received a model that is not there, expected one of "
                f"{', '.join(sorted(folders))}. Write one of these."
            )
    for where, step, sibling in _known_steps(config):
        served = sibling.served_versions()
        if step.model_version != -1 and step.model_version not in served:
            yield config.remark(
                f"{where}: received model_version {step.model_version}, or none, expected -1 for "
                f"the latest or one of {served}. Write model_version: -1."
            )
        limit, size = sibling.message.max_batch_size, config.message.max_batch_size
        if limit and limit < size:
            yield config.remark(
                f"{where}: received max_batch_size {size} of the ensemble, expected at most "
                f"{limit}, the step's. Write max_batch_size: {limit}."
            )


def ensemble_maps(config: Config) -> Remarks:
    """Maps name inputs and outputs that the steps' models have, and leave out none required."""
    for where, step, sibling in _known_steps(config):
        inputs = {tensor.name for tensor in sibling.message.input}
        outputs = {tensor.name for tensor in sibling.message.output}
        required = {tensor.name for tensor in sibling.message.input if not tensor.optional}
        for kind, keys, known in (
            ("input_map", set(step.input_map), inputs),
            ("output_map", set(step.output_map), outputs),
        ):
            for name in sorted(keys - known):
                yield config.remark(
                    f'{where}: received {kind} key "{name}", expected one of '
                    f"{', '.join(sorted(known))}. Write the model's own name."
                )
        for name in sorted(required - set(step.input_map)):
            yield config.remark(
                f'{where}: received no input_map key "{name}", expected all of '
                f"{', '.join(sorted(required))}. Map it."
            )


def ensemble_tensors(config: Config) -> Remarks:
    """All who read or write a tensor of the ensemble agree about its type and shape."""
    message = config.message
    if not message.HasField("ensemble_scheduling"):
        return
    batched = message.max_batch_size > 0
    seen: dict[str, _Tensor] = {}
    for tensor in (*message.input, *message.output):
        own = _Tensor("the ensemble", enum_name(tensor, "data_type"), shape_of(tensor), batched)
        seen.setdefault(tensor.name, own)
    for where, step, sibling in _known_steps(config):
        step_batched = sibling.message.max_batch_size > 0
        for mapping, tensors in (
            (step.input_map, sibling.message.input),
            (step.output_map, sibling.message.output),
        ):
            for tensor in tensors:
                if tensor.name not in mapping:
                    continue
                data_type = enum_name(tensor, "data_type")
                new = _Tensor(where, data_type, list(tensor.dims), step_batched)
                name = mapping[tensor.name]
                problem = _difference(seen.setdefault(name, new), new)
                if problem:
                    yield config.remark(f'tensor "{name}": {problem}')


def _difference(old: _Tensor, new: _Tensor) -> str:
    if old.data_type != new.data_type:
        return (
            f"received {new.data_type} by {new.source}, expected {old.data_type} as by "
            f"{old.source}. Make them equal."
        )
    if not (_match(old.dims, new.dims) or _match(old.full_dims, new.full_dims)):
        return (
            f"received shape {new.full_dims} by {new.source}, expected {old.full_dims} as by "
            f"{old.source}. Make them equal."
        )
    return ""


def _match(left: list[int], right: list[int]) -> bool:
    return len(left) == len(right) and all(
        a == b or -1 in (a, b) for a, b in zip(left, right, strict=True)
    )


def ensemble_flow(config: Config) -> Remarks:
    """Every tensor is made once, from what is there before, and is of use."""
    steps = [step for _, step in _steps(config)]
    inputs = {tensor.name for tensor in config.message.input}
    outputs = {tensor.name for tensor in config.message.output}
    if not steps:
        return
    writers = Counter(name for step in steps for name in step.output_map.values())
    readers = {name for step in steps for name in step.input_map.values()}
    ready = _reachable(steps, inputs)
    for name in sorted(name for name, count in writers.items() if count > 1):
        yield config.remark(
            f'tensor "{name}": received {writers[name]} steps that write it, expected one. '
            "Rename the others."
        )
    for name in sorted((outputs | readers) - ready):
        yield config.remark(
            f'tensor "{name}": received no step that can write it, expected an input of the '
            "ensemble or an output of a step before. Map it."
        )
    for name in sorted((inputs - readers) | (set(writers) - readers - outputs)):
        yield config.remark(
            f'tensor "{name}": received no step that reads it, expected a use: the server refuses '
            "it. Remove it."
        )


def _reachable(steps: list[Any], inputs: set[str]) -> set[str]:
    """Return the tensors that are known once every step that can run has run."""
    ready, size = set(inputs), -1
    while len(ready) != size:
        size = len(ready)
        for step in steps:
            if set(step.input_map.values()) <= ready:
                ready |= set(step.output_map.values())
    return ready
