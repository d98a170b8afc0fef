"""`python -m fxc` is the fxc command."""

from fxc.cli import app

if __name__ == "__main__":
    app(prog_name="fxc")
