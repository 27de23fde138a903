"""Record of a server's health: what it says of itself, and what one real inference says."""

from typing import Any

from pydantic import Field

from treeq_export.records.base import Record


class ModelHealth(Record):
    """One model.

    Attributes:
        name: Its name on the server.
        ready: What the server says; None if it says nothing.
        healthy: Whether one real inference succeeded.
        latency_ms: Of that inference; None if it did not succeed.
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
        error: Why the server could not be asked, or a model not be loaded; None where it could.
    """

    url: str
    live: bool | None
    ready: bool | None
    models: list[ModelHealth]
    reloaded: list[str] = Field(default_factory=list)
    error: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether every model answered a real request."""
        return self.error is None and bool(self.models) and all(m.healthy for m in self.models)

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
