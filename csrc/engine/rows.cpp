#include "engine/rows.h"

#include <vector>

namespace distorch {

void gather_rows(const Source& source, std::span<const int64_t> rows, std::byte* into) {
  const Decoder& decoder = *source.decoder;
  const uint64_t stored = decoder.stored_row(), decoded = decoder.decoded_row();
  const std::byte* memory = source.donor->host();
  std::vector<std::byte> buffer(memory == nullptr ? stored : 0);
  for (const int64_t row : rows) {
    const auto number = static_cast<uint64_t>(row);
    const std::byte* from = memory == nullptr ? buffer.data() : memory + number * stored;
    if (memory == nullptr) source.donor->read(number * stored, stored, buffer.data(), false);
    decoder.decode(number, number + 1, from, into);
    into += decoded;
  }
}

}  // namespace distorch
