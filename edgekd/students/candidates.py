"""Candidates for the student, proposed from the section ``student.search``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgekd.config.networks import HUBS, TEACHERS_OWN, StudentConfig, TeacherConfig
from edgekd.config.pruning import DropLayersConfig, DropLayersGrid, PruneConfig, PruneGrid
from edgekd.config.search import CandidateSource, SearchConfig
from edgekd.errors import InputError

if TYPE_CHECKING:
    from edgekd.models.dict_model import DictModel
    from edgekd.spec import TensorSpec

_WHERE = "student.search"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A student that a search may choose."""

    name: str
    """Readable and unique in its search: ``teacher pruned 0.5``, ``convnet-s blocks=1 20px``."""
    origin: str
    """``prune`` or ``drop_layers`` (a trained network made smaller), ``family`` (a built-in network
    or a hub's), ``list`` (the user's own)."""
    student: StudentConfig
    """The complete section ``student``, which can be copied into a pipeline."""
    parameters: int = 0
    """Its number of parameters, estimated where channels are removed; 0: not yet known."""
    where: str = _WHERE
    """Its entry in the pipeline file, for errors."""


def combinations(sources: Sequence[CandidateSource]) -> tuple[Candidate, ...]:
    """All combinations of the lists of each source, without repetitions; nothing is built."""
    found: list[Candidate] = []
    for number, source in enumerate(sources):
        where = f"{_WHERE}.candidates[{number}]"
        found += [replace(candidate, where=where) for candidate in _of_source(source)]
    named: dict[str, Candidate] = {}
    sections = set[str]()
    for candidate in found:
        if (section := candidate.student.model_dump_json()) in sections:
            continue
        sections.add(section)
        name, number = candidate.name, 1
        if name in named and candidate.student.args:
            name = " ".join([name, *_arguments(candidate.student.args)])
        base = name
        while name in named:
            number += 1
            name = f"{base} #{number}"
        named[name] = replace(candidate, name=name)
    return tuple(named.values())


def propose(
    search: SearchConfig,
    teacher: TeacherConfig,
    network: DictModel | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    say: Say,
) -> tuple[Candidate, ...]:
    """The candidates of a search, at most ``max_candidates``, in the order of the section.

    Those that cannot be built for these data are left out, which is said with the reason, and those
    that are the same network as an earlier one.

    Args:
        search: the section ``student.search``.
        teacher: the section ``teacher``.
        network: the teacher's network, fresh weights suffice; None for an ONNX file.
        inputs: what the data deliver.
        outputs: the outputs that the task needs.
        say: shows a message.

    Raises:
        InputError: no candidate, or only one, can be built.
    """
    sources = search.candidates
    if sources is None:
        sources = default_sources(network, inputs, say)
    found: list[Candidate] = []
    seen: dict[str, str] = {}
    problems: list[InputError] = []
    for candidate in combinations(sources):
        try:
            sized, identity = _sized(candidate, teacher, network, inputs, outputs)
        except InputError as error:
            problems.append(error)
            say(f"  {candidate.name} is left out: {error.what}")
            continue
        if identity in seen:
            say(f"  {candidate.name} is left out: it is the same network as {seen[identity]}")
            continue
        seen[identity] = candidate.name
        found.append(sized)
    if not found and problems:
        raise problems[0]
    if len(found) < 2:
        raise InputError(
            f"the search has {len(found) or 'no'} candidate{'s' * (not found)}"
            + (f", {found[0].name}, and there is nothing to choose" if found else ""),
            where=_WHERE,
            remedy="give more under search.candidates, or write the student without search",
        )
    if len(found) > search.max_candidates:
        say(
            f"  search: {len(found)} candidates, of which {search.max_candidates} of evenly "
            f"spread size are considered ({_WHERE}.max_candidates)"
        )
        order = {candidate.name: number for number, candidate in enumerate(found)}
        by_size = sorted(found, key=lambda candidate: candidate.parameters)
        kept = _spread(by_size, search.max_candidates)
        found = sorted(kept, key=lambda candidate: order[candidate.name])
    return tuple(found)


def default_sources(
    network: DictModel | None, inputs: Sequence[TensorSpec], say: Say
) -> tuple[CandidateSource, ...]:
    """The sources of a search that names none: the teacher made smaller, and built-in networks.

    Args:
        network: the teacher's; None: an ONNX file, which cannot be made smaller.
        inputs: what the data deliver.
        say: shows a message.
    """
    from edgekd.students.depth import repeated_blocks
    from edgekd.students.pruning_plan import torch_pruning

    sources = []
    if network is not None:
        try:
            torch_pruning()
            sources.append(CandidateSource(prune=PruneGrid(ratio=(0.25, 0.5, 0.75, 0.875))))
        except InputError as error:
            say(f"  search: the teacher is not pruned: {error.what} ({error.remedy})")
        if repeated_blocks(network):
            sources.append(CandidateSource(drop_layers=DropLayersGrid(keep=(0.5, 0.75))))
    floats = all(spec.dtype.startswith("float") for spec in inputs)
    images = [spec for spec in inputs if len(spec.shape) == 4]
    grids: dict[str, dict[str, list[Any]]] = {}
    if images and floats and len(inputs) == 1:
        grids["convnet-s"] = {
            "widths": [[8, 12, 24], [16, 24, 48], [32, 48, 96]],
            "blocks": [0, 1],
        }
        grids["mobilenet"] = {"width": [0.5, 1.0]}
    elif images and floats:
        grids["policy-s"] = {"widths": [[8, 16, 24], [16, 32, 48]], "hidden": [24, 64]}
    elif floats:
        grids["mlp"] = {"hidden": [[16], [32, 32], [64, 64], [128, 128]]}
        if len(inputs) == 1 and len(inputs[0].shape) == 3:
            grids["transformer"] = {"width": [16, 32, 64]}
    sources += [CandidateSource(model=name, grid=grid) for name, grid in grids.items()]
    if not sources:
        raise InputError(
            "no built-in network takes these data, and an ONNX teacher cannot be made smaller: "
            f"{', '.join(map(str, inputs))}",
            where=_WHERE,
            remedy="name networks of your own under search.candidates",
        )
    return tuple(sources)


def _of_source(source: CandidateSource) -> Iterator[Candidate]:
    """All combinations of a source."""
    drops: list[DropLayersConfig | None] = [None]
    prunes: list[PruneConfig | None] = [None]
    if source.drop_layers is not None:
        drops = [DropLayersConfig(keep=keep) for keep in source.drop_layers.keep]
    grid = source.prune
    if grid is not None:
        keys = ("importance", "scope", "round_to", "inherit", "ratio")
        lists = [getattr(grid, key) for key in keys]
        prunes = [
            PruneConfig(keep=grid.keep, **dict(zip(keys, values, strict=True)))
            for values in itertools.product(*lists)
        ]
    model = source.model or TEACHERS_OWN
    origin = "prune" if grid is not None else "drop_layers" if source.drop_layers else "list"
    if origin == "list" and model != TEACHERS_OWN:
        origin = "family" if ":" not in model or model.startswith(HUBS) else "list"
    resolutions = source.resolution or (None,)
    for values in itertools.product(*source.grid.values()):
        varied = dict(zip(source.grid, values, strict=True))
        for drop, prune, resolution in itertools.product(drops, prunes, resolutions):
            student = StudentConfig(
                model=model,
                args={**source.args, **varied},
                checkpoint=source.checkpoint,
                drop_layers=drop,
                prune=prune,
                resolution=resolution,
            )
            yield Candidate(_name(student, varied, grid), origin, student)


def _name(student: StudentConfig, varied: Mapping[str, Any], grid: PruneGrid | None) -> str:
    """What distinguishes a candidate from others of its source."""
    words = [student.model or "", *_arguments(varied)]
    if student.drop_layers is not None:
        words.append(f"depth {student.drop_layers.keep:g}")
    prune = student.prune
    if prune is not None and grid is not None:
        words.append(f"pruned {prune.ratio:g}")
        for key in ("importance", "scope"):
            if len(getattr(grid, key)) > 1:
                words.append(str(getattr(prune, key)))
        if len(grid.round_to) > 1:
            words.append(f"round {prune.round_to}")
        if not prune.inherit:
            words.append("fresh")
    if student.resolution is not None:
        size = student.resolution
        words.append(f"{size}px" if isinstance(size, int) else f"{size[0]}x{size[1]}px")
    return " ".join(words)


def _arguments(args: Mapping[str, Any]) -> list[str]:
    """``widths=16-32 blocks=1``."""

    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return "-".join(map(text, value))
        return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")

    return [f"{key}={text(value)}" for key, value in args.items()]


def _sized(
    candidate: Candidate,
    teacher: TeacherConfig,
    network: DictModel | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> tuple[Candidate, str]:
    """A candidate with its number of parameters, and a text that is the same for the same network.

    Raises:
        InputError: it cannot be built for these data.
    """
    from edgekd.models.adapted import Adaptation, input_resolution
    from edgekd.models.build import build_model, find_model
    from edgekd.models.dict_model import count_parameters
    from edgekd.spec import ModelSpec
    from edgekd.students.depth import dropped_names

    student, where = candidate.student, candidate.where
    resolution = None
    if student.resolution is not None:
        found = input_resolution(student.resolution, inputs, None, where)
        resolution = None if found is None else found.resolution
    if student.model == TEACHERS_OWN:
        if network is None:
            raise InputError(
                "the teacher is an ONNX file, which is no network that can be made smaller",
                where=where,
                remedy="give the teacher as a model with its checkpoint, or name other models",
            )
        model, made = network, ["teacher"]
        if resolution is None and student.drop_layers is None and student.prune is None:
            raise InputError(
                "it would be the teacher unchanged: the images have that size",
                where=where,
                remedy="give another resolution",
            )
    else:
        adaptation = Adaptation(input=found if resolution is not None else None)
        own = adaptation.network_spec(ModelSpec(tuple(inputs), tuple(outputs)))
        model = build_model(student, own.inputs, own.outputs, where=where)
        maker = find_model(student.model or "")
        defaults = maker.keywords if isinstance(maker, partial) else {}
        function = maker.func if isinstance(maker, partial) else student.model
        made = [str(function), json.dumps({**defaults, **student.args}, sort_keys=True)]
    parameters = float(count_parameters(model))
    dropped: tuple[str, ...] = ()
    if student.drop_layers is not None:
        dropped = dropped_names(model, student.drop_layers.keep)
        modules = dict(model.module.named_modules())
        parameters -= sum(count_parameters(modules[name]) for name in dropped)
    if student.prune is not None and student.prune.ratio is not None:
        # Layers lose that share of their inputs and of their outputs.
        parameters *= (1 - student.prune.ratio) ** 2
    prune = student.prune.model_dump_json() if student.prune is not None else None
    identity = json.dumps([*made, student.checkpoint, dropped, prune, resolution])
    return replace(candidate, parameters=int(parameters)), identity


def _spread(candidates: Sequence[Candidate], count: int) -> tuple[Candidate, ...]:
    """So many of them at evenly spaced positions, with the first and the last."""
    last = len(candidates) - 1
    return tuple(candidates[round(k * last / (count - 1))] for k in range(count))
