"""Rules about batch sizes, queues and answers."""

from treeq_export.serve.lint_read import DENOISER, Config, Remarks

MAX_DELAY_US = 200  # a bls sampler pays the denoiser's delay at every step


def max_batch(config: Config) -> Remarks:
    """max_batch_size is at least 1: CUDA graphs never match with 0, nor can requests be merged."""
    size = config.message.max_batch_size
    if size < 0 or (size == 0 and not config.is_ensemble):
        yield config.remark(
            f"max_batch_size: received {size}, or none, expected 1 or more: with 0 nothing is "
            "batched and CUDA graphs never match. Write max_batch_size: 1, and dims without "
            "the batch axis."
        )


def batch_fits_profile(config: Config) -> Remarks:
    """The denoiser's largest batch is one that it was built for."""
    profile, size = config.folder.repository.profile, config.message.max_batch_size
    if config.folder.name == DENOISER and profile is not None and size > profile.max:
        yield config.remark(
            f"max_batch_size: received {size}, expected at most {profile.max}, the largest batch "
            f"of the model's profile (manifest.json). Write {profile.max}, or build with a "
            "larger profile."
        )


def preferred_batch(config: Config) -> Remarks:
    """Preferred batch sizes are between 1 and max_batch_size."""
    limit = config.message.max_batch_size
    sizes = list(config.message.dynamic_batching.preferred_batch_size)
    if limit > 0 and not all(1 <= size <= limit for size in sizes):
        yield config.remark(
            f"dynamic_batching: received preferred_batch_size {sizes}, expected sizes of 1 to "
            f"{limit}, which is max_batch_size. Remove the others."
        )


def batching_needs_batches(config: Config) -> Remarks:
    """Dynamic batching has batches to make; with max_batch_size 0 it does nothing, silently."""
    if config.message.HasField("dynamic_batching") and config.message.max_batch_size < 1:
        yield config.remark(
            "dynamic_batching: received it with max_batch_size "
            f"{config.message.max_batch_size}, where it merges nothing, expected 1 or more. "
            "Write a max_batch_size, or remove dynamic_batching."
        )


def queue_delay(config: Config) -> Remarks:
    """The denoiser of a bls sampler waits 0..200 us: the delay is paid at every step."""
    delay = config.message.dynamic_batching.max_queue_delay_microseconds
    if config.folder.name != DENOISER or delay <= MAX_DELAY_US:
        return
    siblings = [config.sibling(name) for name in config.folder.repository.folders]
    if any(other is not None and other.parameter("treeq_mode") == "bls" for other in siblings):
        yield config.remark(
            f"dynamic_batching: received max_queue_delay_microseconds {delay}, expected "
            f"0..{MAX_DELAY_US}: the bls sampler waits that long at every step. "
            f"Write {MAX_DELAY_US} or less."
        )


def queue_priority(config: Config) -> Remarks:
    """Priorities of a queue are among its levels, and do not contradict its order."""
    batching = config.message.dynamic_batching
    levels, default = batching.priority_levels, batching.default_priority_level
    if not levels:
        return
    named = [default, *batching.priority_queue_policy]
    if not all(1 <= level <= levels for level in named):
        yield config.remark(
            f"dynamic_batching: received priorities {named} (the default first), expected 1 to "
            f"{levels}, which is priority_levels. Write default_priority_level: 1."
        )
    if levels > 1 and batching.preserve_ordering:
        yield config.remark(
            f"dynamic_batching: received preserve_ordering with {levels} priority_levels, expected "
            "one of the two. Remove preserve_ordering."
        )


def decoupled_answers(config: Config) -> Remarks:
    """A model that answers several times can do so, and its answers are not cached."""
    if not config.message.model_transaction_policy.decoupled:
        return
    if config.message.response_cache.enable:
        yield config.remark(
            "response_cache: received enable with a decoupled model, expected one of the two: "
            "the server refuses both. Remove response_cache."
        )
    if config.backend in ("onnxruntime", "tensorrt"):
        yield config.remark(
            f'model_transaction_policy: received decoupled for backend "{config.backend}", which '
            "answers once, expected false: HTTP and BLS requests would be refused. Remove it."
        )
