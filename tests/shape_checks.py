"""The type checker that jaxtyping's import hook puts on every function of the tensor packages while tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception, BeartypeDecorHintPep3119Exception

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# PEP 484's numeric tower: an int is welcome where a float is asked for.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: FunctionT) -> FunctionT:
    """Return `function` with its arguments and result checked against its annotations, shapes included.

    What beartype can't read on a lone method stays as it is: `Self`, and Protocols that are not checkable at run time.
    """
    try:
        return _check(function)
    except (BeartypeDecorHintPep3119Exception, BeartypeDecorHintPep673Exception):
        return function
