"""The version of the package, readable before anything else of it is imported."""

__version__ = "0.1.0"
