// Every operator of distorch, in one place. None of them mutates an argument
// but read_file and read_donor, which write `into`, and set_data.
#include <ATen/TensorUtils.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/file.h"
#include "device/accelerator.h"
#include "device/devices.h"
#include "device/storages.h"
#include "hook/errors.h"
#include "hook/sharded.h"
#include "hook/sweep.h"

namespace distorch {
namespace {

std::shared_ptr<Counters> no_group() {
  static auto& counters = *new std::shared_ptr<Counters>(std::make_shared<Counters>());
  return counters;
}

// See Note [Alignment and last bits].
uint64_t alignment_of(at::ScalarType dtype) {
  const bool small_float = at::isReducedFloatingType(dtype) || at::isFloat8Type(dtype);
  return small_float ? kLooseAlign : kAlign;
}

// The shape of a sharded tensor, in elements.
struct Geometry {
  at::ScalarType dtype;
  at::IntArrayRef sizes;
  at::IntArrayRef strides;
  int64_t offset;
};

Geometry geometry_of(const at::Tensor& tensor) {
  return {tensor.scalar_type(), tensor.sizes(), tensor.strides(), tensor.storage_offset()};
}

at::Tensor wrap_donor(std::shared_ptr<Donor> donor, c10::Storage in_place, const Geometry& geometry,
                      at::Device compute, const std::string& name, uint64_t alignment = kAlign) {
  sweep_operators();
  auto weight = std::make_shared<Weight>(name, std::move(donor), ring_for(compute.str()),
                                         no_group(), alignment);
  return make_sharded(make_tagged_storage({std::move(weight), compute, std::move(in_place)}),
                      geometry.dtype, geometry.sizes, geometry.strides, geometry.offset);
}

// The donor is the storage of `data` itself (host memory).
at::Tensor shard_host(const at::Tensor& data, at::Device compute, std::string name) {
  TORCH_CHECK_VALUE(data.device().is_cpu() && !is_sharded(data),
                    "shard_host takes a plain CPU tensor");
  auto owner = std::make_shared<c10::Storage>(data.storage());
  auto donor = std::make_shared<HostDonor>(owner, static_cast<std::byte*>(owner->mutable_data()),
                                           owner->nbytes());
  c10::Storage in_place;
  if (compute.is_cpu()) in_place = *owner;
  return wrap_donor(std::move(donor), std::move(in_place), geometry_of(data), compute, name);
}

// The donor is pinned host memory for a compute device that copies: bytes
// [begin, begin + bytes of `like`) of `slab` (uint8), with the geometry of `like`.
at::Tensor shard_slab(const at::Tensor& slab, int64_t begin, const at::Tensor& like,
                      at::Device compute, std::string name) {
  TORCH_CHECK_VALUE(slab.device().is_cpu() && begin >= 0, "shard_slab takes a CPU tensor");
  const auto bytes = static_cast<int64_t>(like.storage().nbytes());
  TORCH_CHECK_VALUE(begin + bytes <= static_cast<int64_t>(slab.storage().nbytes()),
                    "shard_slab: the weight is outside the slab");
  auto owner = std::make_shared<c10::Storage>(slab.storage());
  auto* data = static_cast<std::byte*>(owner->mutable_data()) + begin;
  const void* slab_id = slab.storage().unsafeGetStorageImpl();
  auto donor = std::make_shared<HostDonor>(owner, data, bytes, slab_id);
  return wrap_donor(std::move(donor), {}, geometry_of(like), compute, name);
}

// Pinned memory for copies to a device, exact in size: uint8 [bytes].
at::Tensor pinned_slab(int64_t bytes, at::Device compute) {
  return pinned_memory(static_cast<uint64_t>(bytes), compute.type());
}

// The donor is the memory of a device: the storage of `data` itself.
at::Tensor shard_device(const at::Tensor& data, at::Device compute, std::string name) {
  TORCH_CHECK_VALUE(!is_sharded(data), "shard_device takes a plain tensor");
  auto donor = std::make_shared<DeviceDonor>(data.storage());
  c10::Storage in_place;
  if (compute == data.device()) in_place = data.storage();
  return wrap_donor(std::move(donor), std::move(in_place), geometry_of(data), compute, name);
}

// The donors of several sharded tensors (uint8), one after the other, as the
// bytes of one weight with the geometry of `like`.
at::Tensor shard_striped(at::TensorList parts, const at::Tensor& like, at::Device compute,
                         std::string name) {
  std::vector<std::shared_ptr<Donor>> donors;
  uint64_t bytes = 0;
  for (const at::Tensor& part : parts) {
    donors.push_back(handle_of(part).weight->donor());
    TORCH_CHECK_VALUE(!donors.back()->extents().empty(), "a disk cannot hold a stripe");
    bytes += donors.back()->size();
  }
  TORCH_CHECK_VALUE(bytes == like.storage().nbytes(), "the stripes do not add up to the weight");
  return wrap_donor(std::make_shared<StripedDonor>(std::move(donors)), {}, geometry_of(like),
                    compute, name);
}

// `self.data = data` for tensors of devices that PyTorch does not let change
// places. The version of `self` is kept.
void set_data(at::Tensor self, const at::Tensor& data) {
  self.unsafeGetTensorImpl()->shallow_copy_from(data.getIntrusivePtr());
}

// The donor is a range of a file, which is only ever read. Sizes and strides
// in elements; the range is what they span.
at::Tensor shard_file(std::string path, int64_t offset, at::IntArrayRef sizes, at::ScalarType dtype,
                      at::Device compute, std::string name) {
  return at_border([&] {
    const int64_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
    auto donor = std::make_shared<FileDonor>(File::open(path), offset, bytes);
    const std::vector<int64_t> strides = at::detail::defaultStrides(sizes);
    return wrap_donor(std::move(donor), {}, {dtype, sizes, strides, 0}, compute, name,
                      alignment_of(dtype));
  });
}

// The donor is a new file under `directory` with the bytes of `data`'s storage.
at::Tensor shard_scratch(const at::Tensor& data, std::string directory, at::Device compute,
                         std::string name) {
  return at_border([&] {
    const at::Tensor host = data.cpu();
    const c10::Storage& storage = host.storage();
    auto donor = FileDonor::scratch(directory, storage.nbytes());
    donor->write(0, storage.nbytes(), static_cast<const std::byte*>(storage.data()));
    return wrap_donor(std::move(donor), {}, geometry_of(host), compute, name);
  });
}

bool is_sharded_op(const at::Tensor& tensor) { return is_sharded(tensor); }

// (weight id, bytes of its storage, tier, where in words, read-only, name)
std::tuple<int64_t, int64_t, std::string, std::string, bool, std::string> weight_info(
    const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(is_sharded(tensor), "weight_info takes a sharded tensor");
  const Weight& weight = *handle_of(tensor).weight;
  const auto donor = weight.donor();
  return {weight.id(),       donor->size(),      donor->tier(),
          donor->describe(), !donor->writable(), weight.name()};
}

// (path, offset in bytes) of a weight that is read from a checkpoint, else ("", 0).
std::tuple<std::string, int64_t> file_range(const at::Tensor& tensor) {
  const auto donor = std::dynamic_pointer_cast<FileDonor>(handle_of(tensor).weight->donor());
  if (donor == nullptr || !donor->is_checkpoint()) return {"", 0};
  return {donor->path(), static_cast<int64_t>(donor->offset())};
}

// A second sharded tensor on the same donor: for copies of a module. Donors
// that can be written are copied by the caller instead.
at::Tensor share(const at::Tensor& tensor) {
  const Handle& handle = handle_of(tensor);
  TORCH_CHECK_VALUE(!handle.weight->donor()->writable(), "share takes a read-only donor");
  return wrap_donor(handle.weight->donor(), {}, geometry_of(tensor), handle.compute,
                    handle.weight->name(), handle.weight->alignment());
}

// The donor's bytes as a CPU tensor of them, without a copy: host memory
// itself, or a private map of a file.
at::Tensor donor_bytes(const at::Tensor& tensor) {
  return at_border([&] {
    struct Keep {
      std::shared_ptr<Donor> donor;
      std::shared_ptr<std::byte> data;
    };
    const auto donor = handle_of(tensor).weight->donor();
    auto* keep = new Keep{donor, donor->map()};
    at::DataPtr pointer(
        keep->data.get(), keep, [](void* at) { delete static_cast<Keep*>(at); }, at::kCPU);
    const auto bytes = static_cast<int64_t>(donor->size());
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(pointer), nullptr,
                         false);
    at::Tensor alias = at::empty({0}, at::TensorOptions().dtype(at::kByte));
    alias.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
    alias.unsafeGetTensorImpl()->set_sizes_contiguous({bytes});
    return alias;
  });
}

void check_target(const at::Tensor& into) {
  TORCH_CHECK_VALUE(into.is_contiguous() && into.device().is_cpu() && !is_sharded(into),
                    "expected a contiguous plain CPU tensor to read into");
}

// Exactly the bytes of `into` (contiguous, CPU) from the file, past the page cache.
void read_file(std::string path, int64_t offset, at::Tensor into) {
  at_border([&] {
    check_target(into);
    const FileDonor range(File::open(path), offset, into.nbytes());
    range.read_range(0, into.nbytes(), static_cast<std::byte*>(into.mutable_data_ptr()));
  });
}

// The donor's bytes from `begin` on, as many as `into` (contiguous, CPU) has.
void read_donor(const at::Tensor& tensor, int64_t begin, at::Tensor into) {
  at_border([&] {
    check_target(into);
    const auto donor = handle_of(tensor).weight->donor();
    TORCH_CHECK_VALUE(begin >= 0 && begin + into.nbytes() <= donor->size(),
                      "read_donor: the range is outside the weight");
    donor->read_range(begin, into.nbytes(), static_cast<std::byte*>(into.mutable_data_ptr()));
  });
}

// The order in which weights are likely to be used, before any pass was seen.
void suggest_order(at::TensorList sharded) {
  std::vector<Weight*> streamed;
  for (const at::Tensor& tensor : sharded) {
    const Handle& handle = handle_of(tensor);
    if (!handle.in_place) streamed.push_back(handle.weight.get());
  }
  for (size_t i = 0; i < streamed.size(); ++i) {
    streamed[i]->ring().suggest(*streamed[i], streamed[(i + 1) % streamed.size()]->id());
  }
}

// Fetches of this weight count in the group of that id from now on.
void count_in(const at::Tensor& tensor, int64_t group) {
  auto counters = Counters::find(static_cast<uint64_t>(group));
  TORCH_CHECK_VALUE(counters != nullptr, "no counters with id ", group);
  handle_of(tensor).weight->count_in(std::move(counters));
}

int64_t sweep() { return static_cast<int64_t>(sweep_operators()); }

}  // namespace

TORCH_LIBRARY(distorch, library) {
  library.def("shard_host(Tensor data, Device compute, str name) -> Tensor", &shard_host);
  library.def(
      "shard_file(str path, int offset, int[] sizes, ScalarType dtype, Device compute, str name) "
      "-> Tensor",
      &shard_file);
  library.def("shard_scratch(Tensor data, str directory, Device compute, str name) -> Tensor",
              &shard_scratch);
  library.def("pinned_slab(int bytes, Device compute) -> Tensor", &pinned_slab);
  library.def("shard_slab(Tensor slab, int begin, Tensor like, Device compute, str name) -> Tensor",
              &shard_slab);
  library.def("shard_device(Tensor data, Device compute, str name) -> Tensor", &shard_device);
  library.def("shard_striped(Tensor[] parts, Tensor like, Device compute, str name) -> Tensor",
              &shard_striped);
  library.def("set_data(Tensor(a!) self, Tensor data) -> ()", &set_data);
  library.def("is_sharded(Tensor tensor) -> bool", &is_sharded_op);
  library.def("weight_info(Tensor tensor) -> (int, int, str, str, bool, str)", &weight_info);
  library.def("file_range(Tensor tensor) -> (str, int)", &file_range);
  library.def("share(Tensor tensor) -> Tensor", &share);
  library.def("donor_bytes(Tensor tensor) -> Tensor", &donor_bytes);
  library.def("read_file(str path, int offset, Tensor(a!) into) -> ()", &read_file);
  library.def("read_donor(Tensor tensor, int begin, Tensor(a!) into) -> ()", &read_donor);
  library.def("suggest_order(Tensor[] sharded) -> ()", &suggest_order);
  library.def("count_in(Tensor tensor, int group) -> ()", &count_in);
  library.def("sweep() -> int", &sweep);
}

}  // namespace distorch
