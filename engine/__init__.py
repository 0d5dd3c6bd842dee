"""Hearth: every model warm behind one OpenAI-format endpoint."""

__version__ = "0.1.0"
