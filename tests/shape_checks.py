"""jaxtyping's checks of every function at every call, for a third of the time.

Its own decorator binds the arguments before a call and checks them again after it, and opens a scope for axes around
functions that name none. Here beartype checks arguments and result once, in a scope where there are axes. It takes the
place of theirs in all that is imported after this.
"""

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from inspect import get_annotations, isclass
from typing import Any

import jaxtyping
from beartype import beartype

THEIRS = jaxtyping.jaxtyped
AXES = THEIRS("context")  # a scope in which an axis has one size


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    if typechecker is beartype:  # of `lalm_lens.shapes.typed`
        return THEIRS(function, typechecker=typechecker) if function else THEIRS(typechecker=typechecker)
    if function is None:
        return partial(jaxtyped, typechecker=typechecker)
    if not isclass(function):
        return checked(function)
    if is_dataclass(function):
        function.__init__ = checked(function.__init__)
    return function


def checked(function: Callable) -> Callable:
    hints = get_annotations(function)
    function.__annotations__ = {name: Any if isinstance(hint, str) else hint for name, hint in hints.items()}
    check = beartype(function)
    function.__annotations__ = check.__annotations__ = hints  # what is named in quotes is not there yet
    if not any("jaxtyping." in repr(hint) for hint in hints.values()):
        return check

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with AXES:
            return check(*args, **kwargs)

    return call


jaxtyping.jaxtyped = jaxtyped
