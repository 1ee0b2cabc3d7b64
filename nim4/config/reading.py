"""Reading settings: YAML files, `--set`, and the checks that turn them into dataclasses; and the one error a user's mistake raises."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")


class RecipeError(Exception):
    """A mistake of the user's, told in one line and ended with exit code 2: no traceback.

    Args:
        where: the file, option or utterance that is wrong.
        expected: what should have been there.
        found: what was there.
        fix: the command or the change that mends it.
    """

    def __init__(self, where: object, *, expected: str, found: object, fix: str):
        super().__init__(f"{where}: expected {expected}, found {found}. Fix: {fix}")

    def __reduce__(self) -> tuple:
        """The message alone travels from a worker process; an exception that cannot be rebuilt there would hide it."""
        return RecipeError.__new__, (RecipeError, *self.args)


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like `name`, for error messages; all of them when none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known names are {', '.join(sorted(known))}"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dict. Raises RecipeError when it cannot be read, or holds no mapping."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(path, expected="a readable YAML file", found=reason, fix="correct the file or the option that names it") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise RecipeError(path, expected="key: value lines", found=type(loaded).__name__, fix="see the files in local/conf/")
    return loaded


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Puts `a.b=value` settings, as given to `--set`, into nested `values`; the value is read as YAML."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {override}", expected="key=value", found=override, fix="for example --set train.cr_weight=0")
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise RecipeError(f"--set {override}", expected=f"{parent!r} to be a group of settings", found=node, fix="check the key")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {override}", expected="a YAML value after =", found=text, fix="quote the value") from error
    return values


def build(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A dataclass from nested `values`. Raises RecipeError on an unknown key or a value of the wrong type."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise RecipeError(f"{where}: {key}", expected="a known setting", found=repr(key), fix=nearest(key, list(hints)))
        arguments[key] = _coerce(value, hints[key], f"{where}: {key}")
    return cls(**arguments)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise RecipeError(where, expected="a group of settings", found=repr(value), fix="indent its keys below it")
        return build(hint, value, where)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = _option(value, [option for option in typing.get_args(hint) if option is not type(None)], where)
        if dataclasses.is_dataclass(hint):
            return _coerce(value, hint, where)
        origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(where, expected="a list", found=repr(value), fix="write [a, b]")
        item_hints = typing.get_args(hint)
        item_hints = [item_hints[0]] * len(value) if item_hints[-1] is Ellipsis else item_hints
        if len(item_hints) != len(value):
            raise RecipeError(where, expected=f"{len(item_hints)} values", found=len(value), fix="correct the list")
        return tuple(_coerce(item, item_hint, where) for item, item_hint in zip(value, item_hints, strict=True))
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    if type(value) is not hint:
        raise RecipeError(where, expected=f"{hint.__name__}", found=repr(value), fix="correct the value")
    return value


def _option(value: Any, options: list[Any], where: str) -> Any:
    """Of several groups of settings the one whose `kind` is the value's; without it the first."""
    if len(options) == 1 or not isinstance(value, Mapping):
        return options[0]
    kinds = {option.kind: option for option in options}
    kind = value.get("kind", options[0].kind)
    if kind not in kinds:
        raise RecipeError(f"{where}: kind", expected=" or ".join(kinds), found=repr(kind), fix="correct the value")
    return kinds[kind]


def load(cls: type[Config], values: Mapping[str, Any], overrides: Sequence[str], where: str) -> Config:
    """`values` (from YAML) with `overrides` (from --set) on top, as a checked dataclass."""
    return build(cls, apply_overrides({key: value for key, value in values.items()}, overrides), where)


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts and lists, as YAML and JSON keep it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))
