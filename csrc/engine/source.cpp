// SPDX-License-Identifier: Apache-2.0
#include "engine/source.h"

#include <cstring>
#include <vector>

#include "core/host_access.h"
#include "engine/waiting.h"

namespace distorch {

void Source::gather(std::span<const int64_t> rows, uint64_t row_bytes, std::byte* into) const {
  const std::byte* memory = donor->host();
  if (memory != nullptr) host_reads(memory, donor->size(), "reading rows of a donor");
  if (memory == nullptr && decoder == nullptr) return donor->gather(rows, row_bytes, into);
  const uint64_t stored = stored_row(row_bytes);
  std::vector<std::byte> packed(memory == nullptr ? rows.size() * stored : 0);
  if (memory == nullptr) donor->gather(rows, stored, packed.data());
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto number = static_cast<uint64_t>(rows[i]);
    const std::byte* from =
        memory == nullptr ? packed.data() + i * stored : memory + number * stored;
    if (decoder) {
      decoder->decode(number, number + 1, from, into);
    } else {
      std::memcpy(into, from, row_bytes);
    }
    into += row_bytes;
  }
}

Error Source::could_not_bring(ErrorKind kind, const std::string& name,
                              const std::string& why) const {
  return Error(kind, "weight '" + name + "' (" + std::to_string(donor->size()) +
                         " bytes) could not be brought from " + donor->describe() + ": " + why);
}

void let_go(Source source) {
  check_mutex_held(false);
  if (source.donor.use_count() == 1) source.donor->settle();
}

}  // namespace distorch
