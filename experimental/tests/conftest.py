"""Fixtures of the experiments' tests: those of the compile tests."""

from tests.compile.conftest import make_branch as make_branch
from tests.compile.conftest import make_sum_model as make_sum_model

pytest_plugins = ["tests.hand_layers"]
