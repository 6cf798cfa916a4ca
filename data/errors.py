"""The one error of everything under `data`: files that are missing, damaged or laid out otherwise."""


class DataError(ValueError):
    """Say which path was read, what was expected there and what to do; raised before any training starts."""
