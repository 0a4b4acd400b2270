"""Classes whose options are the fields of a nested `Config`: tasks and modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from layerzoo.spec import Config, SpecError, required

if TYPE_CHECKING:

    class _Called(type):
        """Tells type checkers that fields build the config. They take the result for Any."""

        def __call__(cls, config: Config | None = None, /, **fields: Any) -> Any: ...

else:
    _Called = type


class Configured(metaclass=_Called):
    """Base of classes whose options are declared once, as the fields of a nested `Config`.

    A subclass extends the `Config` of its base, and its constructor takes a config alone:

        class Mine(Base):
            class Config(Base.Config):
                size: int = 4
                \"\"\"How large it is.\"\"\"

            def __init__(self, config: Config) -> None:
                super().__init__(config)

    It is called with a config, ``Mine(Mine.Config(size=8))``, or with fields, ``Mine(size=8)``.
    `inspect.signature` shows the fields, and so do the command line and an editor.

    Raises:
        SpecError: at the class statement, a constructor that takes anything but a config; then an
            unknown field, or a value that the config refuses.
        TypeError: an argument by place that is no config of the class.
    """

    Config: ClassVar[Any]  # a subclass of layerzoo.spec.Config

    given: Any
    """The config that the object was called with. A constructor may hand on another one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("__init__")
        if own is not None and not _takes_a_config(own):
            raise SpecError(
                f"{cls.__module__}.{cls.__qualname__}: its constructor takes options; declare "
                f"them as fields of a nested Config, and let it take a config alone"
            )
        for base in cls.__mro__:
            if (wanted := vars(base).get("Config")) and not issubclass(cls.Config, wanted):
                raise SpecError(
                    f"{cls.__module__}.{cls.__qualname__}: its Config must extend "
                    f"{base.__qualname__}.Config"
                )
        build: Any = cls.__init__
        cls.__init__ = _constructor(cls, build)

    @classmethod
    def located(cls, error: SpecError) -> str:
        """An error in the options, behind the place where a user writes them."""
        return f"{cls.__name__}: {error}"


def _takes_a_config(constructor: Any) -> bool:
    """Whether it takes itself and one argument by place."""
    kinds = [parameter.kind for parameter in inspect.signature(constructor).parameters.values()]
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(kinds) == 2 and all(kind in by_place for kind in kinds)


def _constructor(cls: type[Configured], build: Callable[[Any, Any], None]) -> Any:
    """A constructor of the class from a config or its fields, which `build` turns into one."""

    def __init__(self: Configured, config: Any = None, /, **fields: Any) -> None:
        if config is None:
            try:
                config = cls.Config.from_fields(fields)
            except SpecError as error:
                raise SpecError(cls.located(error)) from None
        elif fields or not isinstance(config, cls.Config):
            name = cls.__qualname__
            raise TypeError(f"{name} takes a {name}.Config, or else its fields by keyword")
        vars(self).setdefault("given", config)  # the outermost constructor is the first
        build(self, config)

    functools.update_wrapper(__init__, build, assigned=("__module__", "__doc__"), updated=())
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    vars(__init__)["__signature__"] = _signature(cls.Config)
    return __init__


def _signature(config: type[Config]) -> inspect.Signature:
    """The constructor's, with the fields of the most derived class in front."""
    hints, kind = get_type_hints(config), inspect.Parameter
    return inspect.Signature(
        [
            kind("self", kind.POSITIONAL_OR_KEYWORD),
            *(
                kind(
                    field.name,
                    kind.KEYWORD_ONLY,
                    default=kind.empty if required(field) else field.default,
                    annotation=hints[field.name],
                )
                for field in config.nearest_first()
            ),
        ]
    )
