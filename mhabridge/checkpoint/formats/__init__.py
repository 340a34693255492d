"""One module or two for each checkpoint format, and the table of them all (``known``)."""
