"""A Triton server without docker and without a GPU, from the wheel `nvidia-pytriton`.

    make triton-env
    .triton/bin/python samples/local_triton/server.py runs/digits/triton

The wheel carries a real `tritonserver` with the Python backend, and neither ONNX Runtime's nor
TensorRT's. `--emulate` puts Python stand-ins in their place (emulated/), which run the graph in
ONNX Runtime on the CPU: schema, scheduling and wiring of a repository are tested that way, its
speed is not.

The server needs an environment of its own: its Python backend returns empty tensors, without a
message, where numpy is 2 or newer.

The wheel's Triton is 2.51 (October 2024). It lacks the fixes of NVIDIA's security bulletins of 2025
and 2026, of bulletin 5828 with an authentication bypass among them. It is for trying and testing on
one machine, listens on 127.0.0.1, and does not belong on a network.
"""

import argparse
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_QUERY = """
import sys, sysconfig
print(sysconfig.get_path("purelib"))
print("%d.%d" % sys.version_info[:2])
print(sysconfig.get_config_var("LIBDIR"))
"""
_EMULATED = Path(__file__).parent / "emulated"
_EXIT_S = 6  # what the server waits for its models; one whose process was killed never unloads
_SHUTDOWN_S = _EXIT_S + 4.0
_ASK_S = 5.0
_PR_SET_PDEATHSIG = 1  # of Linux
_LIBC = ctypes.CDLL(None)
_CHECK = Path(__file__).parents[2] / "treeq_served" / "check_manifest.py"
_ORPHANS_S = 1.5  # within which the processes of models notice that the server is gone


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        http: HTTP address, "127.0.0.1:port".
        grpc: gRPC address.
        metrics: Address of the metrics.
        process: The server itself; the models' processes are its children.
        log: File with all that it says.
    """

    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(frozen=True)
class _Installation:
    """Where an environment keeps the server.

    Attributes:
        binary: The executable.
        libraries: LD_LIBRARY_PATH.
        path: Folder of the environment's programs.
        backends: Folder of the wheel's Python backend.
        stub: What runs a Python model, for this environment's version of Python.
    """

    binary: Path
    libraries: str
    path: Path
    backends: Path
    stub: Path


def _find_installation(python: Path) -> _Installation:
    """Return where the environment of `python` keeps the server.

    Raises:
        SystemExit: It has none.
    """
    lines = subprocess.run(
        [python, "-c", _QUERY], check=True, capture_output=True, text=True
    ).stdout.split("\n")
    packages, version, libdir = lines[:3]
    root = Path(packages) / "pytriton" / "tritonserver"
    if not (root / "bin" / "tritonserver").is_file():
        raise SystemExit(f"{python}: no nvidia-pytriton in its environment. Run `make triton-env`.")
    return _Installation(
        binary=root / "bin" / "tritonserver",
        libraries=f"{packages}/nvidia_pytriton.libs:{libdir}",
        path=python.parent,
        backends=root / "backends" / "python",
        stub=root / "python_backend_stubs" / version / "triton_python_backend_stub",
    )


def _write_backends(installation: _Installation, folder: Path, *, emulate: bool) -> None:
    """Fill a backend directory: Python's, and the emulated ones where they are wanted."""
    python = folder / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(installation.backends / name, python / name)
    shutil.copy2(installation.stub, python / "triton_python_backend_stub")
    if emulate:
        for backend in _EMULATED.iterdir():
            shutil.copytree(backend, folder / backend.name, dirs_exist_ok=True)


def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_until_ready(server: Server, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if server.process.poll() is not None:
            tail = server.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"tritonserver ended with {server.process.returncode}:\n{tail}")
        ready = f"http://{server.http}/v2/health/ready"
        with suppress(OSError), urllib.request.urlopen(ready, timeout=_ASK_S):
            return
        time.sleep(0.1)
    raise TimeoutError(server.log.read_text(errors="replace")[-3000:])


@contextmanager
def serve(
    repository: Path,
    python: Path,
    *,
    emulate: bool = False,
    ports: Sequence[int] = (),
    arguments: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    timeout_s: float = 120.0,
) -> Iterator[Server]:
    """Start a repository's launch.sh with the wheel's server, and stop it at the end.

    Args:
        repository: Model repository; one without launch.sh is started plainly.
        python: Python of the server's environment.
        emulate: Whether the missing backends are emulated.
        ports: Ports of HTTP, gRPC and metrics; None takes free ones.
        arguments: Further ones of tritonserver.
        environment: Further variables of the server's process.
        timeout_s: Until it has to be ready.

    Yields:
        The server, ready.

    Raises:
        RuntimeError: It ended, with the end of its log.
        TimeoutError: It is not ready in time.
        SystemExit: Triton cannot serve a repository at this path, or keep its files here.
    """
    _check_path(repository.absolute())
    _check_path(Path(tempfile.gettempdir()))
    installation = _find_installation(python.absolute())
    prefix = f"treeq_{os.getpid()}_{os.urandom(3).hex()}_"
    http, grpc, metrics = ports or _free_ports(3)
    with tempfile.TemporaryDirectory(prefix="treeq-triton-") as scratch:
        backends, log = Path(scratch) / "backends", Path(scratch) / "triton.log"
        _write_backends(installation, backends, emulate=emulate)
        variables = {
            "TRITONSERVER": str(installation.binary),
            "TRITON_BACKENDS": str(backends),
            "TRITON_ADDRESS": "127.0.0.1",
            "HTTP_PORT": str(http),
            "GRPC_PORT": str(grpc),
            "METRICS_PORT": str(metrics),
            "LD_LIBRARY_PATH": installation.libraries,
            "PATH": f"{installation.path}:{os.environ['PATH']}",
            **(environment or {}),
        }
        command = [
            *_starter(repository, variables),
            f"--exit-timeout-secs={_EXIT_S}",
            "--allow-gpu-metrics=false",
            f"--cache-directory={installation.binary.parent.parent / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            *arguments,
        ]
        own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=own | variables,
                preexec_fn=_end_with_parent,
            )
        server = Server(
            f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", process, log
        )
        try:
            _wait_until_ready(server, timeout_s)
            yield server
        finally:
            _stop(process, prefix)


def _check_path(path: Path) -> None:
    """Check what the repository's own check_manifest.py does, for repositories without one too."""
    spec = importlib.util.spec_from_file_location("check_manifest", _CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unfit = module.find_unfit(path)
    if unfit is not None:
        raise SystemExit(unfit)


def _end_with_parent() -> None:
    """Let the server end when this process does, whatever ends that."""
    with suppress(OSError, AttributeError):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _starter(repository: Path, variables: dict[str, str]) -> list[str]:
    script = repository / "launch.sh"
    if script.is_file():
        return [str(script.absolute())]
    return [
        variables["TRITONSERVER"],
        f"--model-repository={repository}",
        f"--backend-directory={variables['TRITON_BACKENDS']}",
        *(f"--{kind}-address={variables['TRITON_ADDRESS']}" for kind in ("http", "grpc")),
        f"--metrics-address={variables['TRITON_ADDRESS']}",
        *(f"--{kind}-port={variables[f'{kind.upper()}_PORT']}" for kind in ("http", "grpc")),
        f"--metrics-port={variables['METRICS_PORT']}",
        "--model-control-mode=explicit",
        "--load-model=*",
    ]


def _stop(process: "subprocess.Popen[bytes]", prefix: str) -> None:
    """Stop a server and remove the shared memory that its models may have left."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    time.sleep(_ORPHANS_S)
    for file in Path("/dev/shm").glob(f"{prefix}*"):
        file.unlink(missing_ok=True)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--emulate", action="store_true", help="Stand-ins of missing backends.")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("arguments", nargs="*", help="Further ones of tritonserver, after --.")
    options = parser.parse_args()
    ports = [options.http_port + offset for offset in range(3)]
    try:
        with serve(
            options.repository,
            options.python,
            emulate=options.emulate,
            ports=ports,
            arguments=options.arguments,
        ) as server:
            print(f"http://{server.http} grpc://{server.grpc}  Ctrl-C stops it.", flush=True)
            with suppress(KeyboardInterrupt):
                server.process.wait()
    except (RuntimeError, TimeoutError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the server is stopped too
    main()
