"""Comparing checkpoints: their weights in canonical form, whatever the framework, the file format and the layout."""

from mhabridge.diff.checkpoints.diffing import diff_checkpoints as diff_checkpoints
