"""The errors of distorch: each names what was expected, what was found and what to do."""


class DistorchError(Exception):
    """Base of every error that distorch raises on purpose."""


class SpecError(DistorchError, ValueError):
    """The placement string (names the entry and its position) or another option is wrong."""


class PlacementError(DistorchError, RuntimeError):
    """A placement cannot be honoured with this model on these devices."""


class PlacementWarning(UserWarning):
    """A placement is followed as far as it can be: a device holds more than its share."""


class FormatError(DistorchError, ValueError):
    """A file is not there, damaged, cut short, or of an unknown kind."""


class FetchError(DistorchError, RuntimeError):
    """Bytes could not be brought from a donor, or could not be written back."""
