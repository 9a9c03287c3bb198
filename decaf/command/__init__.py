"""The command `decaf`. Only `main` is imported before there is something to compute."""
