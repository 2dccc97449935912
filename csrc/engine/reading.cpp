#include "engine/reading.h"

#include <vector>

#include "core/host_access.h"
#include "engine/trace_log.h"

namespace distorch {
Error could_not_bring(ErrorKind kind, const std::string& name, const Donor& donor,
                      const std::string& why) {
  return Error(kind, "weight '" + name + "' (" + std::to_string(donor.size()) +
                         " bytes) could not be brought from " + donor.describe() + ": " + why);
}

void read_part(const Donor& donor, const std::string& name, uint64_t begin, uint64_t end,
               std::byte* into) {
  const HostSpan span("reads", name, end - begin);
  host_writes(into, end - begin, "reading a file to host memory");
  try {
    donor.read(begin, end - begin, into, true);
  } catch (const Error& error) {
    throw could_not_bring(error.kind(), name, donor, error.what());
  }
}

void gather_rows(const Source& source, std::span<const int64_t> rows, std::byte* into) {
  const Decoder& decoder = *source.decoder;
  const uint64_t stored = decoder.stored_row(), decoded = decoder.decoded_row();
  const std::byte* memory = source.donor->host();
  if (memory != nullptr) host_reads(memory, source.donor->size(), "reading rows of a donor");
  std::vector<std::byte> packed(memory == nullptr ? rows.size() * stored : 0);
  if (memory == nullptr) source.donor->gather(rows, stored, packed.data());
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto number = static_cast<uint64_t>(rows[i]);
    const std::byte* from =
        memory == nullptr ? packed.data() + i * stored : memory + number * stored;
    decoder.decode(number, number + 1, from, into);
    into += decoded;
  }
}

}  // namespace distorch
