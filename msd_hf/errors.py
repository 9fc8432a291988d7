"""The errors raised by `msd_hf`: all are `ValueError`s, so that code written for `generate` catches them as it is."""


class MSDError(ValueError):
    """Base of every error that this package raises on purpose."""


class MSDCheckpointError(MSDError):
    """A draft checkpoint lacks a weight, has one too many, or one of the wrong shape."""


class MSDPairingError(MSDError):
    """The draft does not fit the target it was given to: other hidden size, or another kind of decoder."""


class MSDUnsupportedError(MSDError):
    """An argument of `generate`, or a kind of target, that cannot be combined with an MSD draft (yet)."""


__all__ = ["MSDCheckpointError", "MSDError", "MSDPairingError", "MSDUnsupportedError"]
