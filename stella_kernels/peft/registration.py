"""Teaching PEFT the adapter type ``STELLA``: once, whatever the order of imports, and never over somebody else's.

PEFT documents ``register_peft_method`` for new methods; it wants a member of its ``PeftType`` enumeration to exist,
and an enumeration cannot be subclassed once it has members, so the member is added in place.
"""

from __future__ import annotations

from typing import Any

OLDEST_PEFT = "0.18.0"
METHOD_NAME = "STELLA"
PREFIX = "stella_"


def require_peft() -> None:
    """Raise ``ImportError``, saying what to install, unless a PEFT this package works with is there."""
    advice = f"Install it with: pip install 'stella_kernels[peft]' (PEFT {OLDEST_PEFT} or newer)."
    try:
        import peft
        from packaging.version import Version
    except ModuleNotFoundError as error:
        raise ImportError(
            f"stella_kernels.peft needs the package {error.name!r}, which is not installed. {advice}"
        ) from (error)
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(
            f"stella_kernels.peft: found PEFT {peft.__version__}, wanted {OLDEST_PEFT} or newer. {advice}"
        )


def extend_peft_type() -> Any:
    """Add the member ``STELLA`` to PEFT's ``PeftType`` unless it is there; return the member.

    Afterwards ``PeftType.STELLA``, ``PeftType("STELLA")``, ``PeftType["STELLA"]``, iteration, comparison with the plain
    string, copying and pickling work as for every other member.
    """
    from peft.utils import peft_types

    PeftType: Any = peft_types.PeftType
    if METHOD_NAME in PeftType.__members__:
        return PeftType[METHOD_NAME]
    member = str.__new__(PeftType, METHOD_NAME)
    member._name_ = METHOD_NAME
    member._value_ = METHOD_NAME
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    # attribute access first: once the name is in the member map, the enumeration refuses to set it
    setattr(PeftType, METHOD_NAME, member)
    PeftType._member_names_.append(METHOD_NAME)
    PeftType._member_map_[METHOD_NAME] = member
    PeftType._value2member_map_[METHOD_NAME] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register the configuration and the tuner with PEFT under ``STELLA``; a second call changes nothing.

    Raises:
        ImportError: another package (the published ``stella``, or PEFT itself) has registered ``STELLA`` already. Both
            write the same files, so either can load the other's, but one process can hold only one of them.
    """
    from peft import mapping
    from peft.utils import register_peft_method

    configs: dict[Any, type] = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    registered = configs.get(METHOD_NAME)  # members compare and hash as their strings
    if registered is config_cls:
        return
    if registered is not None:
        raise ImportError(
            f"stella_kernels.peft: PEFT's method {METHOD_NAME!r} is already registered by {registered.__module__}."
            f"{registered.__qualname__}, and a process can hold only one. Import either that package or "
            "stella_kernels.peft, not both; adapters saved by one are read by the other."
        )
    extend_peft_type()
    register_peft_method(name=METHOD_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
