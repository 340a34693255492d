"""One module or package for each framework, the same public names in each; only here are frameworks imported."""

if __name__ != "mhabridge.adapters":
    raise ImportError(f"import mhabridge.adapters, not {__name__}")
