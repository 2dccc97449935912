#include "engine/donor.h"

#include <cstring>
#include <map>
#include <mutex>

#include "core/bulk_read.h"
#include "core/error.h"

namespace distorch {
namespace {

constexpr size_t kBulkThreads = 4;

// All scratch donors of a folder share one file; it goes with the last of them.
std::shared_ptr<File> shared_scratch(const std::string& directory) {
  static std::mutex mutex;
  static auto& files = *new std::map<std::string, std::weak_ptr<File>>;
  std::lock_guard lock(mutex);
  std::weak_ptr<File>& known = files[directory];
  if (auto file = known.lock(); file && file->writable()) return file;
  auto file = File::scratch(directory);
  known = file;
  return file;
}

}  // namespace

void HostDonor::read(uint64_t begin, uint64_t bytes, std::byte* into, bool) const {
  std::memcpy(into, data_ + begin, bytes);
}

void HostDonor::write(uint64_t begin, uint64_t bytes, const std::byte* from) {
  if (data_ + begin != from) std::memmove(data_ + begin, from, bytes);
}

FileDonor::FileDonor(std::shared_ptr<File> checkpoint, uint64_t offset, uint64_t bytes)
    : file_(std::move(checkpoint)), offset_(offset), bytes_(bytes) {
  if (offset_ > file_->size() || bytes_ > file_->size() - offset_) {
    throw Error(ErrorKind::kFormat, "'" + file_->path() + "' has " + std::to_string(file_->size()) +
                                        " bytes; a weight should lie at " +
                                        std::to_string(offset_) + " + " + std::to_string(bytes_) +
                                        ": the file is cut short or damaged");
  }
}

std::shared_ptr<FileDonor> FileDonor::scratch(const std::string& directory, uint64_t bytes) {
  auto file = shared_scratch(directory);
  const uint64_t offset = file->allocate(bytes);
  return std::make_shared<FileDonor>(std::move(file), offset, bytes);
}

FileDonor::~FileDonor() {
  if (!file_->is_checkpoint()) file_->release(offset_, bytes_);
}

std::string FileDonor::describe() const {
  if (!file_->is_checkpoint()) return "a donor file under '" + file_->path() + "'";
  return "'" + file_->path() + "' at byte " + std::to_string(offset_);
}

void FileDonor::read(uint64_t begin, uint64_t bytes, std::byte* into, bool slack) const {
  file_->read(offset_ + begin, bytes, into, slack);
}

void FileDonor::read_range(uint64_t begin, uint64_t bytes, std::byte* into) const {
  bulk_read(*file_, offset_ + begin, bytes, into, kBulkThreads);
}

void FileDonor::write(uint64_t begin, uint64_t bytes, const std::byte* from) {
  file_->write(offset_ + begin, bytes, from);
}

}  // namespace distorch
