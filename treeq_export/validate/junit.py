"""Parity as JUnit XML, which GitLab, Jenkins and actions of GitHub show test by test.

A target, or a way to run it, is a test suite. The network and each layer are test cases of it, and
one that is out of bounds, or whose error has grown, is a failure with all its numbers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from treeq_export.artefacts import write_bytes
from treeq_export.recipe import ParityGates
from treeq_export.records import LayerParity, ParityRecord, TargetParity
from treeq_export.validate.gates import missed_bounds

NETWORK = "network"
# By target and case, what is wrong besides the bounds.
Faults = Mapping[tuple[str, str], Sequence[str]]

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(path: Path, record: ParityRecord, limits: ParityGates, faults: Faults) -> None:
    """Write a record as JUnit XML, atomically.

    Args:
        path: The file.
        record: Result of validate.
        limits: The recipe's limits, for the layers.
        faults: Further failures, such as errors that have grown.

    Raises:
        OutputError: The file cannot be written.
    """
    root = ET.Element("testsuites", name="treeq-export validate")
    for target in record.targets:
        suite = ET.SubElement(root, "testsuite", name=_text(f"{target.target}: {target.runtime}"))
        properties = ET.SubElement(suite, "properties")
        for name in ("batch_size", "seed"):
            ET.SubElement(properties, "property", name=name, value=str(getattr(record, name)))
        _add_case(suite, target.target, NETWORK, _network_misses(target), target, faults)
        for layer in target.layers:
            missed = missed_bounds(layer, limits)
            _add_case(suite, target.target, layer.name, missed, layer, faults)
        _count(suite)
    _count(root)
    ET.indent(root)
    write_bytes(path, ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _network_misses(target: TargetParity) -> list[str]:
    gate = target.gates[0]  # the one of the network, see make_gates
    return [] if gate.passed else [f"{gate.name}: {gate.measured:.1f} < {gate.limit:g}"]


def _add_case(
    suite: ET.Element,
    target: str,
    name: str,
    missed: Sequence[str],
    measured: LayerParity | TargetParity,
    faults: Faults,
) -> None:
    case = ET.SubElement(suite, "testcase", classname=_text(target), name=_text(name))
    failures = [*missed, *faults.get((target, name), ())]
    if failures:
        failure = ET.SubElement(case, "failure", type="parity", message=_text("; ".join(failures)))
        numbers = measured.model_dump(exclude={"name", "target", "runtime", "layers", "gates"})
        failure.text = "\n".join(f"{key}: {value}" for key, value in numbers.items())


def _count(element: ET.Element) -> None:
    """Write how many cases an element has, and how many of each outcome."""
    element.set("tests", str(len(list(element.iter("testcase")))))
    element.set("failures", str(len(list(element.iter("failure")))))
    element.set("errors", "0")
    if element.tag == "testsuite":
        element.set("skipped", "0")


def _text(text: str) -> str:
    """Return a text with what XML cannot hold written as a Python escape."""
    return _NOT_IN_XML.sub(lambda found: ascii(found[0])[1:-1], text)
