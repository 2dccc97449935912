// SPDX-License-Identifier: Apache-2.0
// Every operator of distorch, in one place. None of them mutates an argument
// but read_file, read_donor and decode_, which write `into`, and set_data.
#include <ATen/TensorUtils.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/file.h"
#include "core/host_memory.h"
#include "device/device_donor.h"
#include "device/devices.h"
#include "device/pinned.h"
#include "device/row_decoder.h"
#include "device/storages.h"
#include "hook/errors.h"
#include "hook/sharded.h"
#include "hook/sweep.h"

namespace distorch {
namespace {

constexpr uint64_t kInPhaseBytes = 256 << 10;  // below, a copy is cheaper than two pages

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

at::Tensor wrap_source(Source source, c10::Storage in_place, const Geometry& geometry,
                       at::Device compute, const std::string& name) {
  sweep_operators();
  auto weight =
      std::make_shared<Weight>(name, std::move(source), ring_for(compute.str()), no_group());
  return make_sharded(make_tagged_storage({std::move(weight), compute, std::move(in_place)}),
                      geometry.dtype, geometry.sizes, geometry.strides, geometry.offset);
}

// The donor is the storage of `data` itself (host memory).
at::Tensor shard_host(const at::Tensor& data, at::Device compute, std::string name) {
  TORCH_CHECK_VALUE(data.device().is_cpu() && !is_sharded(data),
                    "shard_host takes a plain CPU tensor");
  auto donor = std::make_shared<StorageDonor>(data.storage());
  c10::Storage in_place;
  if (compute.is_cpu()) in_place = data.storage();
  return wrap_source({std::move(donor)}, std::move(in_place), geometry_of(data), compute, name);
}

// The donor is pinned host memory for a compute device that copies: bytes
// [begin, begin + bytes of `like`) of `slab` (uint8), with the geometry of `like`.
at::Tensor shard_slab(const at::Tensor& slab, int64_t begin, const at::Tensor& like,
                      at::Device compute, std::string name) {
  TORCH_CHECK_VALUE(slab.device().is_cpu() && begin >= 0, "shard_slab takes a CPU tensor");
  const auto bytes = static_cast<int64_t>(like.storage().nbytes());
  TORCH_CHECK_VALUE(begin + bytes <= static_cast<int64_t>(slab.storage().nbytes()),
                    "shard_slab: the weight is outside the slab");
  auto donor = std::make_shared<StorageDonor>(slab.storage(), begin, bytes);
  return wrap_source({std::move(donor)}, {}, geometry_of(like), compute, name);
}

// Pinned memory for copies to a device, exact in size: uint8 [bytes].
at::Tensor pinned_slab(int64_t bytes, at::Device compute) {
  return pinned_memory(static_cast<uint64_t>(bytes), compute);
}

// The donor is the memory of a device: the storage of `data` itself.
at::Tensor shard_device(const at::Tensor& data, at::Device compute, std::string name) {
  TORCH_CHECK_VALUE(!is_sharded(data), "shard_device takes a plain tensor");
  auto donor = std::make_shared<DeviceDonor>(data.storage());
  c10::Storage in_place;
  if (compute == data.device()) in_place = data.storage();
  return wrap_source({std::move(donor)}, std::move(in_place), geometry_of(data), compute, name);
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
  return wrap_source({std::make_shared<StripedDonor>(std::move(donors))}, {}, geometry_of(like),
                     compute, name);
}

// The donor is a range of a file, which is only ever read. Sizes and strides
// in elements; the range is what they span.
at::Tensor shard_file(std::string path, int64_t offset, at::IntArrayRef sizes, at::ScalarType dtype,
                      at::Device compute, std::string name) {
  return at_border([&] {
    const int64_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
    auto donor = std::make_shared<FileDonor>(File::open(path), offset, bytes);
    const std::vector<int64_t> strides = at::detail::defaultStrides(sizes);
    return wrap_source({std::move(donor), nullptr, alignment_of(dtype)}, {},
                       {dtype, sizes, strides, 0}, compute, name);
  });
}

// The donor is in the scratch file, with the bytes of `data`'s storage.
at::Tensor shard_scratch(const at::Tensor& data, at::Device compute, std::string name) {
  return at_border([&] {
    const at::Tensor host = data.cpu();
    const c10::Storage& storage = host.storage();
    auto donor = FileDonor::scratch(storage.nbytes());
    donor->write(0, storage.nbytes(), static_cast<const std::byte*>(storage.data()));
    return wrap_source({std::move(donor)}, {}, geometry_of(host), compute, name);
  });
}

bool is_sharded_op(const at::Tensor& tensor) { return is_sharded(tensor); }

// (weight id, bytes on the donor, tier, where in words, read-only, name, how
// rows are stored if they are decoded, else "", bytes of factors and scales)
std::tuple<int64_t, int64_t, std::string, std::string, bool, std::string, std::string, int64_t>
weight_info(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(is_sharded(tensor), "weight_info takes a sharded tensor");
  const Weight& weight = *handle_of(tensor).weight;
  const Source source = weight.source();
  const Donor& donor = *source.donor;
  const RowDecoder* decoder = RowDecoder::of(source);
  return {weight.id(),
          donor.size(),
          donor.tier(),
          donor.describe(),
          !donor.writable(),
          weight.name(),
          decoder != nullptr ? decoder->recipe().code->name : "",
          decoder != nullptr ? decoder->factor_bytes() : 0};
}

// ---- weights that are not kept as they are -----------------------------------

// A weight whose rows are stored as `code` says on the donor of `stored`
// (sharded, plain), and which operators see as `dtype` [sizes].
at::Tensor decoded(const at::Tensor& stored, std::string code, at::ScalarType dtype,
                   at::IntArrayRef sizes, const std::optional<at::Tensor>& scales,
                   at::IntArrayRef scale_block, std::string name,
                   const std::optional<at::Tensor>& table, int64_t rotation) {
  return at_border([&] {
    TORCH_CHECK_VALUE(!sizes.empty() && scale_block.size() == 2, "decoded: no shape");
    const Handle& handle = handle_of(stored);
    const RowCode& stored_as = row_code(code);
    const int64_t numbers = c10::multiply_integers(sizes);
    int64_t rows = sizes.size() > 1 ? sizes[0] : 1;
    // Rows that are not whole blocks: each block is a row, and takes no patches.
    if (numbers / std::max<int64_t>(rows, 1) % stored_as.elements != 0) {
      rows = numbers / stored_as.elements;
    }
    const int64_t columns = numbers / std::max<int64_t>(rows, 1);
    RowRecipe recipe{
        &stored_as, scales.value_or(at::Tensor()), scale_block[0], scale_block[1], dtype, rows,
        columns,    table.value_or(at::Tensor()),  rotation};
    auto decoder =
        std::make_shared<RowDecoder>(std::move(recipe), std::vector<PatchTerm>(), handle.compute);
    const auto donor = handle.weight->donor();
    TORCH_CHECK_VALUE(donor->size() == decoder->stored_bytes(), "decoded: ", donor->size(),
                      " bytes stored, ", decoder->stored_bytes(), " expected");
    const std::vector<int64_t> strides = at::detail::defaultStrides(sizes);
    return wrap_source({donor, std::move(decoder), alignment_of(dtype)}, {},
                       {dtype, sizes, strides, 0}, handle.compute, name);
  });
}

// The donor of `stored` (sharded, plain) with the decoder of `like`.
at::Tensor decoded_like(const at::Tensor& stored, const at::Tensor& like) {
  const Handle& handle = handle_of(stored);
  const Handle& known = handle_of(like);
  Source source = known.weight->source();
  source.donor = handle.weight->donor();
  TORCH_CHECK_VALUE(source.decoder != nullptr && handle.compute == known.compute &&
                        source.donor->size() == source.decoder->stored_bytes(),
                    "decoded_like takes the stored bytes of a decoded weight");
  return wrap_source(std::move(source), {}, geometry_of(like), handle.compute,
                     known.weight->name());
}

// The same as another matrix, with as many columns as these terms have: a weight of more than two
// dimensions is a matrix in more than one way. Experts are patched one by one, [experts * outputs,
// inputs]. What has several scales, or is turned, stays the matrix that these are for.
RowRecipe for_terms(RowRecipe recipe, const std::vector<PatchTerm>& terms) {
  const int64_t columns = terms.empty() ? recipe.columns : terms[0].down.size(-1);
  const int64_t numbers = recipe.rows * recipe.columns;
  const bool one_scale = !recipe.scales.defined() || recipe.scales.numel() == 1;
  if (columns == recipe.columns || columns <= 0 || numbers % columns != 0 ||
      columns % recipe.code->elements != 0 || !one_scale || recipe.rotation != 0) {
    return recipe;
  }
  recipe.rows = numbers / columns;
  recipe.columns = columns;
  if (recipe.scales.defined()) {
    recipe.scale_rows = recipe.rows;
    recipe.scale_columns = recipe.columns;
  }
  return recipe;
}

// The recipe of a weight; of one that is kept as it is, that of its dtype.
RowRecipe recipe_of(const at::Tensor& weight, const Source& source) {
  if (const RowDecoder* decoder = RowDecoder::of(source)) return decoder->recipe();
  TORCH_CHECK_VALUE(weight.is_contiguous() && weight.storage_offset() == 0 && weight.dim() > 0 &&
                        source.donor->size() == weight.nbytes(),
                    "a patch at fetch takes a weight that is the whole of its storage");
  const int64_t rows = weight.dim() > 1 ? weight.size(0) : 1;
  std::string name(c10::toString(weight.scalar_type()));
  for (const auto& [dtype, code] :
       {std::pair{at::kFloat, "float32"}, {at::kHalf, "float16"}, {at::kBFloat16, "bfloat16"}}) {
    if (weight.scalar_type() == dtype) name = code;
  }
  return {&row_code(name), {}, 1, 1, weight.scalar_type(), rows, weight.numel() / rows};
}

std::shared_ptr<const RowDecoder> patched_decoder(const at::Tensor& weight, const Source& source,
                                                  std::vector<PatchTerm> terms) {
  RowRecipe recipe = for_terms(recipe_of(weight, source), terms);
  return std::make_shared<RowDecoder>(std::move(recipe), std::move(terms),
                                      handle_of(weight).compute, RowDecoder::of(source));
}

// A weight on the donor of `weight` with these patches, and no others, added
// when it is fetched. Without any it is as it was before the first.
at::Tensor patched(const at::Tensor& weight, at::TensorList ups, at::TensorList downs,
                   at::ArrayRef<double> strengths, at::IntArrayRef first_rows) {
  return at_border([&] {
    const Handle& handle = handle_of(weight);
    Source source = handle.weight->source();
    auto decoder = patched_decoder(weight, source, terms_of(ups, downs, strengths, first_rows));
    source.decoder = decoder->plain() ? nullptr : std::move(decoder);
    c10::Storage in_place = in_place_memory(source, handle.compute);
    return wrap_source(std::move(source), std::move(in_place), geometry_of(weight), handle.compute,
                       handle.weight->name());
  });
}

// The same for a weight that is decoded already, in place: operators that run
// meanwhile see the old patches or the new ones.
void set_patches(const at::Tensor& weight, at::TensorList ups, at::TensorList downs,
                 at::ArrayRef<double> strengths, at::IntArrayRef first_rows) {
  at_border([&] {
    Handle& handle = handle_of(weight);
    Source source = handle.weight->source();
    TORCH_CHECK_VALUE(source.decoder != nullptr, "set_patches takes a decoded weight");
    source.decoder = patched_decoder(weight, source, terms_of(ups, downs, strengths, first_rows));
    handle.weight->move_to(std::move(source));
    moved(handle);
  });
}

int64_t moves(const at::Tensor& weight) {
  return static_cast<int64_t>(handle_of(weight).weight->moves());
}

// The weight is from now on what `same` is made of, which has the same bits, if
// it did not move since moves() gave `moves`; whether it did so. Operators that
// run meanwhile see the one or the other.
bool adopt(const at::Tensor& weight, const at::Tensor& same, int64_t moves) {
  return at_border([&] {
    Handle& handle = handle_of(weight);
    const Handle& other = handle_of(same);
    Source source = other.weight->source();
    TORCH_CHECK_VALUE(source.size() == weight.storage().nbytes() && handle.compute == other.compute,
                      "adopt takes a weight of as many bytes for the same device");
    if (!handle.weight->move_to(std::move(source), static_cast<uint64_t>(moves))) return false;
    moved(handle);
    return true;
  });
}

// (path, offset in bytes) of a weight that is read from a checkpoint, else ("", 0).
std::tuple<std::string, int64_t> file_range(const at::Tensor& tensor) {
  const auto donor = std::dynamic_pointer_cast<FileDonor>(handle_of(tensor).weight->donor());
  if (donor == nullptr || !donor->is_checkpoint()) return {"", 0};
  return {donor->path(), static_cast<int64_t>(donor->offset())};
}

// A second sharded tensor made of what the first is made of now. The first may move on, and this
// one does not. Both write to the same donor: a copy of a module copies donors that can be written.
at::Tensor share(const at::Tensor& tensor) {
  const Handle& handle = handle_of(tensor);
  Source source = handle.weight->source();
  c10::Storage in_place = in_place_memory(source, handle.compute);
  return wrap_source(std::move(source), std::move(in_place), geometry_of(tensor), handle.compute,
                     handle.weight->name());
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

// A new tensor in host memory, not filled.
at::Tensor host_tensor(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor made = at::empty(sizes, at::TensorOptions().dtype(dtype));
  prefer_huge_pages(made.mutable_data_ptr(), made.nbytes());
  return made;
}

// A tensor of its own with the bytes from the file, past the page cache.
at::Tensor read_tensor(std::string path, int64_t offset, at::IntArrayRef sizes,
                       at::ScalarType dtype) {
  return at_border([&] {
    const auto options = at::TensorOptions().dtype(dtype);
    const auto bytes =
        static_cast<uint64_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
    const FileDonor range(File::open(path), offset, bytes);
    if (bytes < kInPhaseBytes || static_cast<uint64_t>(offset) % alignment_of(dtype) != 0) {
      at::Tensor read = host_tensor(sizes, dtype);
      range.read_range(0, bytes, static_cast<std::byte*>(read.mutable_data_ptr()));
      return read;
    }
    at::Tensor read = at::empty({0}, options);
    read.unsafeGetTensorImpl()->set_storage_keep_dtype(memory_in_phase(bytes, offset));
    read.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    range.read_whole(static_cast<std::byte*>(read.mutable_data_ptr()));
    return read;
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

}  // namespace

TORCH_LIBRARY(distorch, library) {
  library.def("shard_host(Tensor data, Device compute, str name) -> Tensor", &shard_host);
  library.def(
      "shard_file(str path, int offset, int[] sizes, ScalarType dtype, Device compute, str name) "
      "-> Tensor",
      &shard_file);
  library.def("shard_scratch(Tensor data, Device compute, str name) -> Tensor", &shard_scratch);
  library.def("pinned_slab(int bytes, Device compute) -> Tensor", &pinned_slab);
  library.def("shard_slab(Tensor slab, int begin, Tensor like, Device compute, str name) -> Tensor",
              &shard_slab);
  library.def("shard_device(Tensor data, Device compute, str name) -> Tensor", &shard_device);
  library.def("shard_striped(Tensor[] parts, Tensor like, Device compute, str name) -> Tensor",
              &shard_striped);
  library.def("is_sharded(Tensor tensor) -> bool", &is_sharded_op);
  library.def("weight_info(Tensor tensor) -> (int, int, str, str, bool, str, str, int)",
              &weight_info);
  library.def(
      "decoded(Tensor stored, str code, ScalarType dtype, int[] sizes, Tensor? scales, "
      "int[] scale_block, str name, Tensor? table=None, int rotation=0) -> Tensor",
      &decoded);
  library.def("block_elements(str code) -> int",
              [](std::string code) { return at_border([&] { return row_code(code).elements; }); });
  library.def("decoded_like(Tensor stored, Tensor like) -> Tensor", &decoded_like);
  library.def(
      "patched(Tensor weight, Tensor[] ups, Tensor[] downs, float[] strengths, int[] first_rows) "
      "-> Tensor",
      &patched);
  library.def(
      "set_patches(Tensor weight, Tensor[] ups, Tensor[] downs, float[] strengths, "
      "int[] first_rows) -> ()",
      &set_patches);
  library.def(
      "decode_(Tensor(a!) into, Tensor stored, str code, Tensor? scales, int[] scale_block, "
      "Tensor[] ups, Tensor[] downs, float[] strengths, int[] first_rows, Tensor(b!)? finite, "
      "Tensor? table=None, int rotation=0) -> ()");
  library.def("interleave_(Tensor(a!) into, Tensor[] parts) -> ()");
  library.def("moves(Tensor weight) -> int", &moves);
  library.def("adopt(Tensor weight, Tensor same, int moves) -> bool", &adopt);
  library.def("file_range(Tensor tensor) -> (str, int)", &file_range);
  library.def("share(Tensor tensor) -> Tensor", &share);
  library.def("donor_bytes(Tensor tensor) -> Tensor", &donor_bytes);
  library.def("host_tensor(int[] sizes, ScalarType dtype) -> Tensor", &host_tensor);
  library.def("read_file(str path, int offset, Tensor(a!) into) -> ()", &read_file);
  library.def("read_tensor(str path, int offset, int[] sizes, ScalarType dtype) -> Tensor",
              &read_tensor);
  library.def("read_donor(Tensor tensor, int begin, Tensor(a!) into) -> ()", &read_donor);
  library.def("suggest_order(Tensor[] sharded) -> ()", &suggest_order);
  library.def("count_in(Tensor tensor, int group) -> ()", &count_in);
  library.def("dequantise(Tensor blocks, str type, ScalarType dtype) -> Tensor");
  library.def("dequantise_(Tensor(a!) into, Tensor blocks, str type) -> ()");
  library.def("show_address(Tensor sharded, bool shown) -> ()", &show_address);
  // Graphs of CUDA graphs are cut here: see Note [Weights in compiled graphs].
  library.def("fetch(Tensor weight, int site) -> Tensor", {at::Tag::cudagraph_unsafe});
}

}  // namespace distorch
