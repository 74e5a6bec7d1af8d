"""gemcut: a Gemma 4 engine. Pictures and text in, text out."""

__version__ = "0.1.0"
