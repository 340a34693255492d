"""One TOML file for each framework: data, no code. Read by ``mhabridge.mapping``."""

if __name__ != "mhabridge.mappings":
    raise ImportError(f"import mhabridge.mappings, not {__name__}")
