"""Errors a user can act on: what was wanted, what was found, what to do next."""


class LensError(Exception):
    """Everything lalm_lens raises on purpose."""


class ConversionError(LensError, ValueError):
    """A checkpoint, its config and our table of weights disagree."""


class AudioError(LensError, ValueError):
    """A clip that cannot be read, or that the model cannot hear."""


class PromptError(LensError, ValueError):
    """A prompt, label or attribute that the model's tokens cannot express."""


class InputError(LensError, ValueError):
    """Model inputs that do not fit together, or do not fit the model."""


class HookError(LensError, KeyError):
    """A hook that would never fire."""

    def __str__(self) -> str:  # KeyError shows the repr of its message
        return str(self.args[0])


class DataError(LensError, ValueError):
    """A folder of clips that is not in audiofolder layout, or contradicts itself."""


def reason(error: BaseException | None) -> str:
    """The first line of what somebody else's error says."""
    return (str(error).strip() or "for no reason given").splitlines()[0]
