"""Builds the training configs of a grid, and finds the override that is to blame for an error."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

from layerzoo.data.replaced_task import replaced
from layerzoo.layer import Reach
from layerzoo.spec import SpecError, suggest
from layerzoo.support.yaml_files import config_path, read_yaml

from .axes import Override
from .cell import Seed
from .configs import Tree, digests_of, model_of, resolve, task_of
from .source import Source

SEED_KEYS = ("seed_everything", "data.init_args.seed")
MAX_STEPS = "trainer.max_steps"


class ConfigBuilder:
    """Makes the training configs of a grid from its base. Until they are resolved they are plain
    trees, whose interpolations are text: a grid has hundreds, and OmegaConf takes its time."""

    def __init__(self, source: Source) -> None:
        self.source, self.file = source, ""
        base = source.value("base")
        with source.locating("base"):
            if isinstance(base, dict):
                written = OmegaConf.create(base)
            else:
                local = source.path.parent / base
                self.file = str(local) if local.is_file() else config_path(base)
                written = read_yaml(self.file)
        self.base: Any = OmegaConf.to_container(written, resolve=False)
        data = self.base.get("data")
        if isinstance(data, str):
            fault = "data: write it as class_path and init_args, which a grid sets"
            raise self._in_base(SpecError(fault))
        if isinstance(data, dict) and data.get("init_args") is None:
            data["init_args"] = {}
        self._reaches: dict[str, Reach | None] = {}
        self._digests: dict[str, dict[str, str]] = {}

    def _in_base(self, error: SpecError) -> SpecError:
        prefix = f"{self.file}: " if self.file else ""
        return self.source.error(("base",), f"{prefix}{error}")

    def draft(self, overrides: Sequence[Override]) -> Tree:
        """The base with the overrides. A later one replaces an earlier one."""
        config = copy.deepcopy(self.base)
        for place, key, value in overrides:
            with self.source.locating(*place):
                _set_key(config, key, value)
        return config

    def resolved(self, draft: Tree, seed: Seed, budget: int | None) -> Tree:
        """The draft, resolved, with the seeds. It validates at least once in its budget."""
        draft["seed_everything"] = seed.init
        if isinstance(data := draft.get("data"), dict):
            if data.get("init_args") is None:
                data["init_args"] = {}
            if isinstance(data["init_args"], dict):
                data["init_args"]["seed"] = seed.data
                self._refuse_leftovers(data)
        tree = resolve(draft)
        interval = tree.get("trainer", {}).get("val_check_interval")
        if budget is not None and isinstance(interval, int) and interval > budget:
            tree["trainer"]["val_check_interval"] = budget
        return tree

    def _refuse_leftovers(self, data: Tree) -> None:
        """Refuse the options of the base's task that another task does not take."""
        found = replaced(self.base.get("data"), data.get("class_path"))
        left = [name for name in found.dropped if name in data["init_args"]] if found else []
        if found and left:
            raise SpecError(
                f"data: {found.new} does not take {', '.join(left)} of the base's {found.old}; "
                f"set the task as a whole, data: {{class_path: {data['class_path']}, init_args: "
                "{..}}"
            )

    def reseeded(self, draft: Tree, tree: Tree, seed: Seed, budget: int | None) -> Tree:
        """The draft's tree with another seed; most configs don't refer to the seeds, and need
        not be resolved again."""
        if re.search(r"\$\{[^}]*seed", json.dumps(draft, default=str)):
            return self.resolved(draft, seed, budget)
        tree = copy.deepcopy(tree)
        tree["seed_everything"], tree["data"]["init_args"]["seed"] = seed
        return tree

    def checked(
        self, overrides: Sequence[Override], seed: Seed, budget: int | None
    ) -> tuple[Tree, Tree]:
        """The draft and its tree, whose model and task build and fit each other.

        Raises:
            SpecError: at the last override without which, and without those after it, the error
                would be another or none; at the base, if there is no such override.
        """
        draft = self.draft(overrides)
        try:
            tree = self.resolved(draft, seed, budget)
            self.reach(tree)
            return draft, tree
        except SpecError as error:
            message = str(error)
        # Not inside `except`: the parser takes the error that is handled for the cause of its own.
        raise self._blame(overrides, seed, message)

    def reach(self, tree: Tree) -> Reach | None:
        """Of the model, which is built, once for all trees that have it and its task."""
        options = {k: v for k, v in tree["data"]["init_args"].items() if k != "seed"}
        key = json.dumps(
            [(tree.get("model") or {}).get("network"), {**tree["data"], "init_args": options}]
        )
        if key not in self._reaches:
            built = model_of(tree)
            task_of(tree).attach(built)
            self._reaches[key] = built.reach()
        return self._reaches[key]

    def digest(self, tree: Tree) -> dict[str, str]:
        """Of what a run reads, see `digests`: read once for all trees that name the same."""
        options = {k: v for k, v in tree["data"]["init_args"].items() if k != "seed"}
        start = {name: tree["model"].get(name) for name in ("init", "network")}
        key = json.dumps(
            [{**tree["data"], "init_args": options}, start if start["init"] else None], default=str
        )
        if key not in self._digests:
            try:
                self._digests[key] = digests_of(tree)
            except SpecError as error:
                raise self._in_base(error) from None
        return self._digests[key]

    def _blame(self, overrides: Sequence[Override], seed: Seed, error: str) -> SpecError:
        for n in reversed(range(len(overrides))):
            try:
                self.reach(self.resolved(self.draft(overrides[:n]), seed, None))
            except SpecError as other:
                if str(other) == error:
                    continue
            return self.source.error(overrides[n].place, error)
        return self._in_base(SpecError(error))


def _set_key(config: Any, key: str, value: Any) -> None:
    """Set a dotted key whose parent exists: a mistyped section is an error, not a new section. In
    a list of layers a name stands for all layers of that name, children too."""
    *path, last = key.split(".")
    for section in _sections_at(config, path, ""):
        section[last] = copy.deepcopy(value)


def _sections_at(node: Any, path: Sequence[str], place: str) -> list[Tree]:
    """What a path leads to from a node of a config, which is at the place."""
    if not path:
        if isinstance(node, list):
            raise SpecError(f"{place} is a list; set all of it, or a field of an item")
        return [node]
    first, *rest = path
    inner = f"{place}.{first}" if place else first
    if isinstance(node, list) and not first.isdecimal():
        named = [layer for layer in _layers_with_fields(node) if layer.get("name") == first]
        if not named:
            known = suggest(first, {str(layer.get("name")) for layer in _layers_with_fields(node)})
            raise SpecError(f"{place} has no layer '{first}'; {known}")
        return [section for layer in named for section in _sections_at(layer, rest, inner)]
    if isinstance(node, list):
        child = node[int(first)] if int(first) < len(node) else None
    else:
        child = node.get(first)
    if not isinstance(child, (dict, list)):
        known = suggest(first, map(str, node)) if isinstance(node, dict) else "see its length"
        raise SpecError(f"the base config has no '{inner}'; {known}")
    return _sections_at(child, rest, inner)


def _layers_with_fields(specs: list[Any]) -> Iterator[Tree]:
    """The layers of a list that are written with fields, and their children."""
    for spec in specs:
        if isinstance(spec, dict):
            yield spec
            if isinstance(children := spec.get("children"), list):
                yield from _layers_with_fields(children)
