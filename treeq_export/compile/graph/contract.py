"""What a pass promises, and who checks it.

A pass says in `requires` what it needs of a graph and in `ensures` what it leaves; onnx_ir calls
both. The list of layers in the metadata is nobody's to forget: after every pass, whatever it did,
it is brought up to date from the graph, and checked.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, InvariantError, PassError, PassResult

from treeq_export.compile.graph.sites import follow_layers
from treeq_export.errors import CompileError

Found = TypeVar("Found")
_SHOWN = 8


class LayerPass(InPlacePass):
    """A pass over a graph whose quantized layers are listed in its metadata."""

    def __call__(self, model_or_result: ir.Model | PassResult, /) -> PassResult:
        """Check, change the model in place, check, and bring the list of layers up to date.

        Raises:
            CompileError: The pass cannot do its work on this graph; names the pass and the nodes.
        """
        try:
            result = super().__call__(model_or_result)
            follow_layers(result.model)
        except (InvariantError, PassError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, CompileError):
                raise cause from error
            raise CompileError(
                f"pass {type(self).__name__}: {cause} Leave the target out of compile.targets, and "
                "report it with the model's config.json."
            ) from error
        return result


class RewritePass(LayerPass, Generic[Found]):
    """A pass that looks for one form and rewrites it; it ensures that nothing of it is left."""

    @abstractmethod
    def _find(self, model: ir.Model) -> Iterator[Found]:
        """Yield what there is to rewrite; each is rewritten before the next is looked for."""

    @abstractmethod
    def _rewrite(self, model: ir.Model, found: Found, /) -> None:
        """Rewrite one of them in place."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite all of them."""
        modified = False
        for found in self._find(model):
            self._rewrite(model, found)
            modified = True
        return PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that none is left."""
        for found in self._find(model):
            raise PassError(f"{found} is left.")


def refuse(nodes: Iterable[ir.Node], problem: str) -> None:
    """Say in `requires` or `ensures` what is wrong with nodes, if there are any.

    Raises:
        PassError: Names the nodes and the problem.
    """
    names = [node.name or node.op_type for node in nodes]
    if names:
        raise PassError(f"{', '.join(names[:_SHOWN])}: {problem}")
