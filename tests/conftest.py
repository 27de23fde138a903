"""What holds for all tests. Their shared fixtures are in the plugins named here."""

import os

# One thread each, here and in every process that a test starts: the workers share the cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

pytest_plugins = [
    "pytester",  # test_tiers
    "tests.export_cache",
    "tests.tiers",
    "tests.tiny_models",
    "tests.digits_runs",
    "tests.hand_layers",
    "tests.commands",
]
