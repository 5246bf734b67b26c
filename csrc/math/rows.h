// Rows of constants: plain structs of floats in the order of their columns in memory.
#pragma once

#include <cstring>

#include "math/macros.h"

namespace coup_fast {

// The row at `columns`. memcpy forgets the alignment of what it copies: without the hint nvcc loads
// the row byte by byte.
template <class Row>
COUP_FAST_FN Row row_at(const float* columns) {
  Row row;
  memcpy(&row, __builtin_assume_aligned(columns, alignof(Row)), sizeof(row));
  return row;
}

}  // namespace coup_fast
