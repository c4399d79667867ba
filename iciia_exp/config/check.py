"""Check: keys against signatures, stable names of targets, and the part of a configuration that counts in digests."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from iciia_exp.config.source import source_digest
from iciia_exp.errors import ConfigError, UserError, check_bool, check_choice, did_you_mean, first_line, nearest

__all__ = [
    *("callbacks_science", "check_keys", "check_nodes", "class_of", "flatten", "identity", "of_library"),
    *("parameters_of", "science", "target_of", "trainer_science"),
]

_Base = TypeVar("_Base")

#: Arguments of Lightning's Trainer that change no number; all others count.
_TRAINER_COSMETIC = {
    *("accelerator", "devices", "num_nodes", "strategy"),
    *("logger", "callbacks", "default_root_dir", "profiler", "log_every_n_steps", "enable_autolog_hparams"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"),
    *("detect_anomaly", "deterministic", "benchmark", "num_sanity_val_steps", "use_distributed_sampler"),
}

#: Callbacks of Lightning that change no number.
_OBSERVERS = {
    *("LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor", "ModelSummary", "RichModelSummary"),
    *("TQDMProgressBar", "RichProgressBar"),
}

#: Packages whose classes have no other stable name than their own, and no settings that the project calls cosmetic.
_LIBRARIES = ("lightning", "pytorch_lightning", "torch", "timm")

_HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_")


def target_of(node: dict[str, Any], path: str) -> Callable[..., Any]:
    """Import the target of a configuration node."""
    if "_target_" not in node:
        raise ConfigError(path, node, "has no _target_; choose one of the group's options")
    logger = logging.getLogger("hydra.utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # the error below says it all
    try:
        target = get_object(node["_target_"])
    except Exception as error:
        name, cause = str(node["_target_"]), error.__cause__
        module = sys.modules.get(name.rpartition(".")[0])
        problem = first_line(cause or error)
        if isinstance(cause, ModuleNotFoundError) and cause.name == name.partition(".")[0]:
            problem = f"no module {cause.name} in the working folder or on PYTHONPATH"
        elif module is not None and isinstance(cause, ModuleNotFoundError | AttributeError):
            names = [own for own, value in vars(module).items() if isinstance(value, type)]
            near = did_you_mean(name.rpartition(".")[2], names, f"its classes are {', '.join(names)}")
            problem = f"{module.__name__} has no {name.rpartition('.')[2]}; {near}"
        raise ConfigError(f"{path}._target_", name, f"cannot be imported ({problem})") from error
    finally:
        logger.setLevel(level)
    if not callable(target):
        raise ConfigError(f"{path}._target_", node["_target_"], "must be a class or a function")
    return target


def class_of(node: dict[str, Any], path: str, base: type[_Base], what: str) -> type[_Base]:
    """Import the target of a node and return it if it is a subclass of ``base``.

    Raises a `ConfigError` that says ``what`` it must be.
    """
    target = target_of(node, path)
    if not (isinstance(target, type) and issubclass(target, base)):
        raise ConfigError(f"{path}._target_", node["_target_"], f"must be {what}")
    return target


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a target, ``self`` left out."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p for p in _signature(target) if p.kind in named}


def _signature(target: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        found = list(inspect.signature(target).parameters.values())
    except ValueError:  # a built-in class, which does not tell: any key
        return [inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)]
    passes_on = bool(found) and found[-1].kind is inspect.Parameter.VAR_KEYWORD
    if passes_on and isinstance(target, type) and target.__module__.startswith("iciia_exp."):  # to its base
        named = {p.name for p in found}
        found[-1:] = [p for p in _signature(target.__mro__[1]) if p.name not in named]
    return found


def check_keys(node: dict[str, Any], path: str) -> None:
    """Raise for keys that are not in the target's signature, here and in nested targets.

    A value must be a list, a dictionary or a text where the package's signature says so; numbers have limits of their
    own, which constructors check.
    """
    target = target_of(node, path)
    parameters, any_key = parameters_of(target), _takes_any_key(target)
    for key, value in node.items():
        if key not in parameters and key not in _HYDRA_KEYS and not any_key:
            near = nearest(str(key), parameters)
            hint = f"did you mean {path}.{near}?" if near else f"valid: {', '.join(parameters)}"
            raise UserError(f"{path}.{key}: no such key; {hint}")
        if isinstance(value, dict) and "_target_" in value:
            check_keys(value, f"{path}.{key}")
    if of_library(node["_target_"]):
        return
    for key, kinds in _kinds_of(target).items():
        if key not in node or (node[key] is None and parameters[key].default is None):  # `x: str = None` of a user's
            continue
        if not isinstance(node[key], tuple(kinds)):
            raise ConfigError(f"{path}.{key}", node[key], f"must be {' or '.join(kinds.values())}")


#: What YAML makes of a type, and its description.
_KINDS: dict[Any, tuple[type, str]] = {
    **dict.fromkeys((str, Path), (str, "a text")),
    **dict.fromkeys((dict, Mapping), (dict, "a dictionary {key: value, ...}")),
    **dict.fromkeys((list, tuple, Sequence), (list, "a list [value, ...]")),
    NoneType: (NoneType, "null"),
}


def _kinds_of(target: Callable[..., Any]) -> dict[str, dict[type, str]]:
    """Return for the parameters that take texts, lists or dictionaries alone what they take, with its description."""
    found = {}
    owners = reversed(target.__mro__) if isinstance(target, type) else ()
    for function in [vars(owner).get("__init__") for owner in owners] or [target]:
        try:
            hints = get_type_hints(function)
        except (NameError, TypeError, AttributeError):  # names that only a type checker imports; built-in functions
            continue
        for name, hint in hints.items():
            parts = [get_origin(part) or part for part in (get_args(hint) if _is_union(hint) else (hint,))]
            found[name] = dict(_KINDS[part] for part in parts) if all(part in _KINDS for part in parts) else {}
    return {name: kinds for name, kinds in found.items() if name != "return" and set(kinds) - {NoneType}}


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def check_nodes(node: Any, path: str = "") -> None:
    """Raise for wrong values of Hydra's own keys (``_target_``, ``_partial_`` ...), here and below."""
    for key, value in _items(node):
        where = f"{path}.{key}" if path else str(key)
        if key == "_target_" and not (isinstance(value, str) and value.strip()):
            raise ConfigError(where, value, "must be the dotted name of a class or function")
        if key in ("_partial_", "_recursive_"):
            check_bool(where, value)
        if key == "_convert_":
            check_choice(where, value, ("none", "partial", "object", "all"))
        check_nodes(value, where)


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def _takes_any_key(target: Callable[..., Any]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _signature(target))


def identity(target: Any) -> str:
    """Return the stable name of a target: its attribute ``name``, else its own name, without the module.

    A class can move to another module without renaming artifacts. That of another package is ``<package>:<name>``, or
    its whole path if it has no name of its own: a subclass inherits that of its base, and is another class.
    """
    package = target.__module__.partition(".")[0]
    if package == __name__.partition(".")[0]:
        name = getattr(target, "name", None)
        return name if isinstance(name, str) else target.__name__
    own = getattr(target, "__dict__", {})
    name = None if own.get("_unnamed") else own.get("name")
    return f"{package}:{name}" if isinstance(name, str) else f"{target.__module__}.{target.__qualname__}"


def science(node: Any) -> Any:
    """Return a configuration without the keys that cannot change a number (``cosmetic`` of its target).

    Targets are replaced by their `identity`, with a digest of their code where it is the user's. A key that is left out
    has its default, and one that is None by default and by value is left out: a new option of a class does not change
    the digests of what was made before.
    """
    if isinstance(node, list | tuple):
        return [science(v) for v in node]
    if isinstance(node, type):  # the default of a part
        node = {"_target_": f"{node.__module__}.{node.__qualname__}"}
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {k: science(v) for k, v in node.items()}
    cosmetic: frozenset[str] = frozenset()
    code: dict[str, str] = {}
    if of_library(node["_target_"]):
        name = _name_in_library(node["_target_"])
    else:
        target = get_object(node["_target_"])
        name, cosmetic, code = identity(target), getattr(target, "cosmetic", frozenset()), _source(target)
        defaults = {n: p.default for n, p in parameters_of(target).items() if p.default is not p.empty}
        node = {k: v for k, v in (defaults | node).items() if v is not None or defaults.get(k, ...) is not None}
    values = {k: science(v) for k, v in node.items() if k not in cosmetic and not k.startswith("_")}
    return {"_target_": name, **code, **values}


def _source(target: Any) -> dict[str, str]:
    """Return the digest of the code of a class or function of the user's, which may change under its name."""
    code = source_digest(target)
    return {} if code is None else {"source_code": code}


def _name_in_library(target: str) -> str:
    """Return the name of a library's class, with its package where PyTorch has another class of the name."""
    package, name = target.partition(".")[0], target.rpartition(".")[2]
    if package != "timm":
        return name
    import torch

    found = get_object(target)
    return name if getattr(torch.optim, name, found) is found else f"{package}.{name}"


def trainer_science(config: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's arguments that can change a number, its devices left out."""
    kept = {k: v for k, v in config.items() if k not in _TRAINER_COSMETIC and not k.startswith("_")}
    if not of_library(config.get("_target_", "")):
        target = target_of(config, "trainer")
        kept |= {"_target_": identity(target), **_source(target)}
    return kept


def of_library(target: str) -> bool:
    """Whether a target is Lightning's, PyTorch's or timm's: known by its name.

    Importing Lightning takes seconds, which a finished run does not need.
    """
    return target.partition(".")[0] in _LIBRARIES


def callbacks_science(nodes: dict[str, Any]) -> list[Any]:
    """Return the callbacks that can change a number: all but Lightning's that only observe."""
    found = [science(node) for node in nodes.values()]
    return [node for node in found if node["_target_"] not in _OBSERVERS]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted names; lists become text.

    >>> flatten({"a": {"b": 1}, "c": [1, 2]})
    {'a.b': 1, 'c': '1,2'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = ",".join(map(str, value)) if isinstance(value, list) else value
    return flat
