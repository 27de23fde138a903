"""Quantized layers of a search by layer, weight bits and activation bits, loaded when needed."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import linear_of
from treeq_export.model.zoo import Denoiser
from treeq_export.search.formats import make_activation_format
from treeq_export.search.session import Session
from treeq_export.search.store import BRANCH, WEIGHT_FILE, pair_prefix
from treeq_export.search.tree import Configuration, Leaf

Handler = Callable[[Tensor], Tensor]  # what a layer runs in the place of itself
Handlers = dict[str, Handler]

_LIMIT_BYTES = 1 << 30  # of quantized layers in memory


class LayerBank:
    """Makes the `QLinear` of a layer in any candidate format.

    Args:
        session: The search, whose weights are prepared.
        denoiser: The full-precision model, for the biases.
        limit_bytes: Size of the layers kept in memory; the least recently used one goes first.
    """

    def __init__(
        self, session: Session, denoiser: Denoiser, limit_bytes: int = _LIMIT_BYTES
    ) -> None:
        self._store = session.store
        self._templates = {layer.name: layer for layer in session.templates}
        self._biases = {name: linear_of(denoiser, x).bias for name, x in self._templates.items()}
        self._section = session.recipe.search
        self._limit_bytes = limit_bytes
        self._layers: OrderedDict[tuple[str, int, int | None], QLinear] = OrderedDict()
        self._num_bytes = 0

    def layer(self, name: str, weight_bits: int, activation_bits: int | None) -> QLinear:
        """Return a layer in one format.

        Args:
            name: The layer.
            weight_bits: With activation_bits, one of the pairs that were fitted.
            activation_bits: 2..8.
        """
        key = (name, weight_bits, activation_bits)
        if key in self._layers:
            self._layers.move_to_end(key)
        else:
            self._layers[key] = self._load(*key)
            self._num_bytes += _size(self._layers[key])
            while self._num_bytes > self._limit_bytes and len(self._layers) > 1:
                _, oldest = self._layers.popitem(last=False)
                self._num_bytes -= _size(oldest)
        return self._layers[key]

    def handlers(self, leaves: Sequence[Leaf], configuration: Configuration) -> Handlers:
        """Return what runs leaves in their formats; those in full precision have no handler.

        Args:
            leaves: Consecutive leaves, at least as many as the configuration has entries.
            configuration: Formats of the first leaves.
        """
        return {
            linear.name: partial(self._run, linear.name, *pair)
            for leaf, pair in zip(leaves, configuration, strict=False)
            if pair is not None
            for linear in leaf.linears
        }

    def _run(self, name: str, weight_bits: int, activation_bits: int | None, x: Tensor) -> Tensor:
        return self.layer(name, weight_bits, activation_bits)(x)

    def _load(self, name: str, weight_bits: int, activation_bits: int | None) -> QLinear:
        prefix = pair_prefix(weight_bits, activation_bits)
        own = {
            key.removeprefix(prefix): value.numpy()
            for key, value in self._store.load(WEIGHT_FILE.format(name)).items()
            if key.startswith((prefix, BRANCH))
        }
        template = self._templates[name]
        layer = template.model_copy(
            update={
                "weight": template.weight.model_copy(update={"bits": weight_bits}),
                "activation": make_activation_format(self._section, activation_bits),
            }
        )
        return QLinear(layer, own, self._biases[name])


def _size(layer: QLinear) -> int:
    return sum(x.numel() * x.element_size() for x in (*layer.parameters(), *layer.buffers()))
