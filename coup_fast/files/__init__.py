"""Files: written whole or not at all, locked where two runs may meet, read with one error."""

from coup_fast.files.reader import (
    IMAGE_SUFFIXES,
    FileError,
    memory,
    read_arrays,
    read_json,
    reading,
)
from coup_fast.files.writer import (
    UNFINISHED,
    append_text,
    lock,
    whole_file,
    write_figure,
    write_tensors,
    write_text,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "UNFINISHED",
    "FileError",
    "append_text",
    "lock",
    "memory",
    "read_arrays",
    "read_json",
    "reading",
    "whole_file",
    "write_figure",
    "write_tensors",
    "write_text",
]
