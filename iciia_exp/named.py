"""Named: classes that are known by a name in digests, folders and tables."""

from typing import Any, ClassVar

__all__ = ["Named"]


class Named:
    """Gives a class of the user's without a ``name`` that of the class, and not that of a base."""

    name: ClassVar[str]
    _unnamed: ClassVar[bool] = False

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "name" not in vars(cls) and not cls.__module__.startswith("iciia_exp."):
            cls.name, cls._unnamed = cls.__name__, True
