#include "engine/source.h"

#include <vector>

#include "core/host_access.h"
#include "engine/waiting.h"

namespace distorch {

void Source::gather(std::span<const int64_t> rows, std::byte* into) const {
  const uint64_t stored = decoder->stored_row(), decoded = decoder->decoded_row();
  const std::byte* memory = donor->host();
  if (memory != nullptr) host_reads(memory, donor->size(), "reading rows of a donor");
  std::vector<std::byte> packed(memory == nullptr ? rows.size() * stored : 0);
  if (memory == nullptr) donor->gather(rows, stored, packed.data());
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto number = static_cast<uint64_t>(rows[i]);
    const std::byte* from =
        memory == nullptr ? packed.data() + i * stored : memory + number * stored;
    decoder->decode(number, number + 1, from, into);
    into += decoded;
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
