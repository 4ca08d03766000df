"""The command line under the name that scripts installed before had for it; see `hf_approx_cli`."""

from hf_approx_cli import app, main

__all__ = ["app", "main"]
