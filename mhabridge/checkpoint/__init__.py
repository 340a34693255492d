"""Checkpoint files: their tensors by name, and the attention layers in them. Nothing read from a file is executed."""

from mhabridge.checkpoint.attention import read_attention as read_attention
from mhabridge.checkpoint.reading import TensorFile as TensorFile
from mhabridge.checkpoint.reading import open_tensors as open_tensors
