"""Record of a server's health: what it says of itself, and what one real inference says."""

import re
from typing import Any

from pydantic import Field

from treeq_export.records.base import Record

_AFTER_BULLETIN = (2, 70)  # of June 2026, by the count of monthly releases from 2.73 of September


class ModelHealth(Record):
    """One model.

    Attributes:
        name: Name of the model on the server.
        ready: What the server says; None if it says nothing.
        healthy: Whether one real inference succeeded.
        latency_ms: Milliseconds of the inference; None if it did not succeed.
        received: What came back: shapes and values, or the error.
    """

    name: str
    ready: bool | None
    healthy: bool
    latency_ms: float | None
    received: str


class HealthRecord(Record):
    """One check of a server.

    Attributes:
        url: The server, without credentials.
        live: Whether it says that it runs; None if it says nothing.
        ready: Whether it says that it and all models are ready; no proof that they work.
        models: The sampler first, then what it is made of, as far as loaded.
        reloaded: Models that were unloaded and loaded before this check, in order.
        server_version: What the server says of itself, such as "2.51.0"; "" where it is not known.
        error: Why the server could not be asked, or a model not be loaded; None where it could.
    """

    url: str
    live: bool | None
    ready: bool | None
    models: list[ModelHealth]
    reloaded: list[str] = Field(default_factory=list)
    server_version: str = ""
    error: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether every model answered a real request."""
        return self.error is None and bool(self.models) and all(m.healthy for m in self.models)

    @property
    def doubt(self) -> str | None:
        """What speaks against a server that is healthy: its age; None where nothing does."""
        match = re.match(r"(\d{1,9})\.(\d{1,9})", self.server_version)
        if match is None or (int(match[1]), int(match[2])) >= _AFTER_BULLETIN:
            return None
        return (
            f"{self.url}: Triton {self.server_version} may lack the fixes of NVIDIA's security "
            "bulletin 5828 of 20 May 2026, an authentication bypass among them; the bulletin names "
            "the releases that have them. Keep it from networks that are not your own."
        )

    def as_json(self) -> dict[str, Any]:
        """Return it for JSON, with the conclusion."""
        return {"healthy": self.healthy, **self.model_dump(mode="json")}

    def summary(self) -> str:
        """Return one line: the latencies of a healthy server, or what is wrong."""
        if self.error is not None:
            return self.error
        bad = [model for model in self.models if not model.healthy]
        if bad:
            cause = bad[-1]  # a part of the sampler, where one is ill
            others = ", ".join(model.name for model in bad[:-1])
            line = f"{cause.name} (ready: {_word(cause.ready)}): {cause.received}"
            return f"{line.rstrip('.')}." + (f" Also not healthy: {others}." if others else "")
        done = ", ".join(f"{model.name} {model.latency_ms:.1f} ms" for model in self.models)
        again = f"; reloaded {', '.join(self.reloaded)}" if self.reloaded else ""
        return f"healthy: {done}{again}"


def _word(ready: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[ready]
