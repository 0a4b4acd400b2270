"""Option: one value of an axis of the fast weights, with its fields, found by its name."""

from __future__ import annotations

from typing import Any, ClassVar

from layerzoo.spec import Config, SpecError, error_at, suggest


class Option(Config):
    """One value of an axis. The class below `Option` is the axis; a class below that, with a name,
    is a value of it: ``class Huber(Objective, name="huber")``. Its fields are its parameters.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Option in cls.__bases__:
            cls.options = {}
        if name is None:
            return
        if name in cls.options:
            raise TypeError(f"option '{name}' is already there: {cls.options[name].__qualname__}")
        cls.name = name
        cls.options[name] = cls

    @classmethod
    def of(cls, value: Any) -> Any:
        """The option that a name, a mapping of name and fields, or an option means.

        Raises:
            SpecError: an unknown name or field, or a value that a field refuses.
        """
        if isinstance(value, cls):
            return value
        fields = {"name": value} if isinstance(value, str) else value
        if not hasattr(fields, "keys") or "name" not in fields:
            raise SpecError(f"expected a name or a mapping with a name, got {value!r}")
        fields = dict(fields)
        name = fields.pop("name")
        if name not in cls.options:
            raise SpecError(f"unknown option '{name}'; {suggest(name, cls.options)}")
        with error_at(name):
            return cls.options[name].from_fields(fields)

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, **self.to_fields()}
