#include "engine/reading.h"

#include <vector>

#include "core/file.h"
#include "core/host_memory.h"
#include "engine/trace_log.h"

namespace distorch {
namespace {

// Memory of its own for each thread that decodes, as large as it ever had to be.
std::byte* scratch_memory(uint64_t bytes) {
  thread_local OwnMemory memory;
  thread_local uint64_t room = 0;
  if (room < bytes) {
    memory.reset();
    memory = huge_pages(bytes);
    room = round_up(bytes, kHugePage);
  }
  return memory.get();
}

}  // namespace

Error could_not_bring(ErrorKind kind, const std::string& name, const Donor& donor,
                      const std::string& why) {
  return Error(kind, "weight '" + name + "' (" + std::to_string(donor.size()) +
                         " bytes) could not be brought from " + donor.describe() + ": " + why);
}

void read_part(const Donor& donor, const std::string& name, uint64_t begin, uint64_t end,
               std::byte* into) {
  const HostSpan span("reads", name, end - begin);
  try {
    donor.read(begin, end - begin, into, true);
  } catch (const Error& error) {
    throw could_not_bring(error.kind(), name, donor, error.what());
  }
}

void decode_part(const Source& source, const std::string& name, uint64_t begin, uint64_t end,
                 std::byte* into) {
  const Decoder& decoder = *source.decoder;
  const uint64_t first = begin * decoder.stored_row(), last = end * decoder.stored_row();
  const std::byte* stored = source.donor->host();
  if (stored != nullptr) {
    stored += first;
  } else {
    const uint64_t lead = (source.donor->phase() + first) % kPage;
    std::byte* memory = scratch_memory(lead + last - first + kPage) + lead;
    read_part(*source.donor, name, first, last, memory);
    stored = memory;
  }
  const HostSpan span("decodes", name, last - first);
  try {
    decoder.decode(begin, end, stored, into + begin * decoder.decoded_row());
  } catch (const Error& error) {
    throw could_not_bring(error.kind(), name, *source.donor, error.what());
  }
}

void gather_rows(const Source& source, std::span<const int64_t> rows, std::byte* into) {
  const Decoder& decoder = *source.decoder;
  const uint64_t stored = decoder.stored_row(), decoded = decoder.decoded_row();
  const std::byte* memory = source.donor->host();
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
