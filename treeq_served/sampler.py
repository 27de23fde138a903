"""The sampler: label, seed, steps and guidance in, an image out.

Mode `inprocess` runs the denoiser in this process. Requests that the server's dynamic batcher hands
over together are sampled together where their steps and guidance are equal.

Mode `bls` calls the model `denoiser` at every step. Requests are sampled concurrently, so that the
denoiser's dynamic batcher can put steps of different requests into one call.

A row's result depends on its own seed and inputs only: its noise is drawn for it alone.
"""

from __future__ import annotations  # of classes that only the server has

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from torch import Tensor

from treeq_served.check_manifest import check_model
from treeq_served.denoise import (
    denoise,
    make_noise,
    make_scheduler,
    pixels_from_samples,
    unpack_samples,
)
from treeq_served.network import Arrays, open_network, run_in_batches
from treeq_served.requests import CancelledError, Group, Job, RefusedError, group_rows, read_job
from treeq_served.settings import VAE_DECODER, SamplerSettings, read_sampler

INPROCESS = "inprocess"
CANCELLED_EVERY_S = 0.1  # between two looks, each of which costs 0.2 ms


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Check the manifest, open the denoiser where it runs in this process.

        Args:
            args: model_config, model_repository, model_version and more, as Triton gives them.

        Raises:
            ValueError: The repository is not what its manifest says.
        """
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"])
        self.name: str = args["model_name"]
        inprocess = config["parameters"]["treeq_mode"]["string_value"] == INPROCESS
        check_model(folder, args["model_version"])
        self.settings: SamplerSettings = read_sampler(folder / args["model_version"])
        network = self.settings.network
        if inprocess:  # then the denoiser's files are this process's too
            check_model(folder.parent / network.model, network.file.split("/")[0])
        torch.set_num_threads(1)  # beside the network there is elementwise work only
        make_scheduler(self.settings.scheduler, 1)  # whose import would take the first request 1 s
        self.decoupled: bool = pb_utils.using_decoupled_model_transaction_policy(config)
        self.concurrent = self.decoupled or not inprocess
        self._network = (
            open_network(folder.parent, network)
            if inprocess
            else lambda inputs: run_in_batches(self._call_denoiser, inputs, network)
        )
        self._one_at_a_time = threading.Lock() if inprocess else nullcontext()
        self._pool = ThreadPoolExecutor(self.settings.concurrency)
        self._slots = threading.BoundedSemaphore(self.settings.concurrency)

    def finalize(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)

    def execute(self, requests: Sequence[pb_utils.InferenceRequest]) -> None:
        """Sample what the batcher hands over; answers go out through each request's sender.

        Args:
            requests: InferenceRequest objects.
        """
        jobs = []
        for request in requests:
            sender = request.get_response_sender()
            try:
                jobs.append(self._read(request, sender))
            except RefusedError as error:
                text = f"{self.name}: {error}"
                _finish(sender, error=pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG))
            except Exception as error:  # of one request only: the others go on
                _finish(sender, error=self._as_triton_error(error))
        if not self.concurrent:
            self._sample(jobs)
            return
        for job in jobs:
            self._slots.acquire()  # beyond this, requests wait in the server's own queue
            self._pool.submit(self._sample_one, job)

    def _read(
        self, request: pb_utils.InferenceRequest, sender: pb_utils.InferenceResponseSender
    ) -> Job:
        names = [tensor.name() for tensor in request.inputs()]
        arrays = {
            name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names
        }
        outputs = tuple(request.requested_output_names())
        job = read_job(arrays, outputs, sender, self.settings)
        if job.preview_every and not self.decoupled:
            raise RefusedError(
                "preview_every: previews need a decoupled model. Leave it out, or write the "
                "repository with `treeq-export serve --decoupled`."
            )
        return job

    def _sample_one(self, job: Job) -> None:
        try:
            self._sample([job])
        finally:
            self._slots.release()

    def _sample(self, jobs: Sequence[Job]) -> None:
        """Sample jobs, and answer each; what fails, fails for the rows it was sampled with."""
        for group in group_rows(jobs):
            try:
                for (job, row), sample in zip(group.rows, self._denoise(group), strict=True):
                    job.latents[row] = sample
            except Exception as error:
                for job, _ in group.rows:
                    job.error = error
        for job in jobs:
            response = None
            try:
                if job.error is None:
                    response = self._respond(job, job.latents, job.steps)
            except Exception as error:
                job.error = error
            if job.error is None:
                _finish(job.sender, response)
            else:
                _finish(job.sender, error=self._as_triton_error(job.error))

    def _as_triton_error(self, error: Exception) -> pb_utils.TritonError:
        cancelled = isinstance(error, CancelledError)
        code = pb_utils.TritonError.CANCELLED if cancelled else pb_utils.TritonError.INTERNAL
        return pb_utils.TritonError(f"{self.name}: {' '.join(str(error).split())}", code)

    def _denoise(self, group: Group) -> NDArray[np.float32]:
        """Return the samples of a group, (n, *sample_shape)."""
        settings = self.settings
        embedded = settings.embedded_guidance is not None
        scale = settings.guidance_scale if embedded else group.guidance
        shape = tuple(settings.sample_shape)
        noise = torch.cat([make_noise(shape, 1, job.seeds[row]) for job, row in group.rows])
        conditioning = {name: torch.from_numpy(rows) for name, rows in group.conditioning.items()}
        null = {
            name: torch.full_like(rows, settings.null[name]) for name, rows in conditioning.items()
        }
        if embedded:
            conditioning["guidance"] = null["guidance"] = torch.full((len(noise),), group.guidance)
        sampled = denoise(
            self._predict,
            noise,
            conditioning,
            make_scheduler(settings.scheduler, group.steps),
            guidance_scale=scale,
            null_conditioning=null,
            on_step=self._on_step([job for job, _ in group.rows]),
        ).numpy()
        if not np.isfinite(sampled).all():
            raise FloatingPointError(
                "the sample is not finite. `treeq-export validate` checks the graph."
            )
        return sampled

    def _predict(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the denoiser's prediction."""
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        with self._one_at_a_time:
            output = self._network(arrays)
        predicted = torch.from_numpy(output.astype(np.float32, copy=False))
        channels = self.settings.prediction_channels
        return predicted if channels is None else predicted[:, :channels]

    def _on_step(self, jobs: Sequence[Job]) -> Callable[[int, Callable[[], Tensor]], None]:
        """Return what looks for cancelled requests, and sends previews, after each step."""
        job = jobs[0]
        looked = time.monotonic()

        def step_done(step: int, clean: Callable[[], Tensor]) -> None:
            nonlocal looked
            if time.monotonic() - looked >= CANCELLED_EVERY_S:
                looked = time.monotonic()
                if all(each.sender.is_cancelled() for each in jobs):
                    raise CancelledError("cancelled by the client.")
            if job.preview_every and step % job.preview_every == 0 and step < job.steps[0]:
                steps = np.full_like(job.steps, step)
                job.sender.send(self._respond(job, clean().numpy(), steps))

        return step_done

    def _respond(
        self, job: Job, latents: NDArray[np.float32], steps: NDArray[np.int32]
    ) -> pb_utils.InferenceResponse:
        """Return a response with the outputs that were asked for."""
        tensors = {"latents": lambda: latents, "step": lambda: steps.reshape(-1, 1)}
        if self.settings.image is not None:
            tensors["image"] = lambda: self._paint(latents)
        wanted = job.outputs or tuple(tensors)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, np.ascontiguousarray(make()))
                for name, make in tensors.items()
                if name in wanted
            ]
        )

    def _paint(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return images (n, h, w, c)."""
        if self.settings.image == "pixels":
            return pixels_from_samples(latents)
        return _call(VAE_DECODER, {"latents": unpack_samples(latents)}, "image")

    def _call_denoiser(self, inputs: Arrays) -> NDArray[Any]:
        """Call the model `denoiser`; what has no axis but the batch is a column there."""
        network = self.settings.network
        columns = {
            name: array[:, None] if array.ndim == 1 else array for name, array in inputs.items()
        }
        return _call(network.model, columns, network.output)


def _call(model: str, inputs: Arrays, output: str) -> NDArray[Any]:
    """Call another model of the server.

    Raises:
        RuntimeError: It is not loaded, or fails.
    """
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[output],
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(a)) for name, a in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    response = request.exec()
    if response.has_error():
        raise RuntimeError(f"{model}: {response.error().message()}")
    return pb_utils.get_output_tensor_by_name(response, output).as_numpy()


def _finish(
    sender: pb_utils.InferenceResponseSender,
    response: pb_utils.InferenceResponse | None = None,
    *,
    error: pb_utils.TritonError | None = None,
) -> None:
    """Send the last response of a request."""
    last = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    sender.send(pb_utils.InferenceResponse(error=error) if error else response, flags=last)
