"""Files: written whole or not at all, locked where two runs may meet."""

from coup_fast.files.writing import (
    UNFINISHED,
    lock,
    whole_file,
    write_figure,
    write_tensors,
    write_text,
)

__all__ = ["UNFINISHED", "lock", "whole_file", "write_figure", "write_tensors", "write_text"]
