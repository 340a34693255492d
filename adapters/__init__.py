"""One module for each framework, with the same public names in each; the only place where a framework is imported."""

if __name__ != "mhabridge.adapters":
    raise ImportError(f"import mhabridge.adapters, not {__name__}")
