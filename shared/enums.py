"""Protobuf enums as peers of other versions may fill them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper

_Number = TypeVar("_Number", bound=int)


def enum_name(enum: _EnumTypeWrapper[_Number], number: _Number) -> str:
    """Name of an enum's value; the number itself, in words, for one that only a newer peer knows."""
    try:
        return enum.Name(number)
    except ValueError:
        return f"value {number}"
