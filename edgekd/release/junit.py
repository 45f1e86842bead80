"""The gate's verdicts as JUnit XML, which every CI system shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from edgekd.release.verdict import Verdict

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(path: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write one test case per rule; *fail* and *not shown* are failures, told apart by type.

    Args:
        path: the XML file.
        name: of the result, the suite's name.
        verdicts: of :func:`edgekd.release.gate.evaluate`.
    """
    failures = sum(verdict.status != "pass" for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", {"name": "edgekd gate", **counts})
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": _text(name), "skipped": "0", **counts}
    )
    for verdict in verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"edgekd.gate.{_text(name)}", name=verdict.rule, time="0"
        )
        message = f"{verdict.rule} ({verdict.budget_text}, {verdict.origin}): {verdict.reason}"
        if verdict.status == "pass":
            ElementTree.SubElement(case, "system-out").text = _text(message)
        else:
            ElementTree.SubElement(
                case, "failure", type=verdict.status, message=_text(message)
            ).text = _text(message)
    tree = ElementTree.ElementTree(root)
    ElementTree.indent(tree)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _text(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold, not even escaped."""
    return _NOT_XML.sub("�", text)
