"""Pickles, read without running them: inert records, and what the known ones mean."""
