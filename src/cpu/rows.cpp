// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows.h"

#include <cstring>

#include "cpu/element.h"

namespace sinkattn::cpu {

void zero_rows(const HeadsTensor& tensor, std::int64_t batch, std::int64_t rows, std::int64_t heads,
               std::int64_t dim) {
  if (tensor.data == nullptr) return;
  const std::int64_t size = dtype_size(tensor.dtype);
  char* base = static_cast<char*>(tensor.data);
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t head = 0; head < heads; ++head) {
        std::memset(base + tensor.offset(b, row, head) * size, 0,
                    static_cast<std::size_t>(dim * size));
      }
    }
  }
}

void fill_statistics(const RowsTensor& tensor, std::int64_t batch, std::int64_t heads,
                     std::int64_t rows, double value) {
  if (tensor.data == nullptr) return;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t head = 0; head < heads; ++head) {
      for (std::int64_t row = 0; row < rows; ++row) {
        store_element(tensor.data, tensor.dtype, tensor.offset(b, head, row), value);
      }
    }
  }
}

}  // namespace sinkattn::cpu
