// SPDX-License-Identifier: Apache-2.0
// Lookups in a table. Where it pays, only the rows that are asked for are brought.
//
// It pays for a table that has to be decoded, and for one that is larger than the ring: such a
// table would take ordinary memory, and its copy would be waited for. A language model's table of
// tokens is often its largest weight, and a step asks for few of its rows.
#include "hook/call.h"

#include <ATen/ops/_unique2.h>
#include <ATen/ops/embedding_ops.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>

#include "core/parts.h"
#include "device/threads.h"
#include "engine/ring.h"
#include "engine/trace_log.h"
#include "hook/errors.h"

namespace distorch {
namespace {

// A table is brought as a whole when this share of its rows is asked for.
constexpr int64_t kWholeShare = 4;
constexpr int64_t kRowsPerPart = 64;

uint64_t row_bytes_of(const at::Tensor& table) {
  return static_cast<uint64_t>(table.size(1)) * table.itemsize();
}

// Whether the donor has the table's rows one after the other.
bool has_rows(const at::Tensor& table, const Source& source) {
  if (table.dim() != 2 || !table.is_contiguous() || table.storage_offset() != 0) return false;
  const auto rows = static_cast<uint64_t>(table.size(0));
  const uint64_t row_bytes = row_bytes_of(table);
  if (source.decoder == nullptr) return rows * row_bytes == source.donor->size();
  return rows == source.decoder->rows() && row_bytes == source.decoder->decoded_row();
}

bool takes_rows(const at::Tensor& table, const Weight& weight, const Source& source,
                const at::Tensor& indices) {
  // The operator itself refuses other dtypes, and indices on another device.
  const bool are_indices = indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt;
  if (!are_indices || indices.device() != table.device() || !has_rows(table, source)) return false;
  if (indices.numel() * kWholeShare >= table.size(0)) return false;
  if (source.decoder != nullptr) return true;
  // The CPU uses what is in RAM where it is.
  const bool in_place = table.is_cpu() && source.donor->host() != nullptr;
  return !in_place && source.donor->size() > weight.ring().capacity();
}

// The rows of these numbers, in memory of the host. Throws Error(kFetch), which names the weight.
at::Tensor gathered(const at::Tensor& table, const Weight& weight, const Source& source,
                    std::span<const int64_t> rows) {
  const uint64_t row_bytes = row_bytes_of(table);
  const auto count = static_cast<int64_t>(rows.size());
  const at::Tensor found =
      at::empty({count, table.size(1)}, at::TensorOptions().dtype(table.dtype()).device(at::kCPU));
  auto* into = static_cast<std::byte*>(found.mutable_data_ptr());
  // The memory of a device: it gathers the rows itself, and one copy brings them.
  const bool by_device = source.donor->host() == nullptr && !source.donor->extents().empty();
  const int64_t per_part = by_device ? std::max<int64_t>(count, 1) : kRowsPerPart;
  try {
    for_ranges(count, per_part, compute_threads(), [&](int64_t begin, int64_t end) {
      source.gather(rows.subspan(begin, end - begin), row_bytes, into + begin * row_bytes);
    });
  } catch (const Error& error) {
    throw source.could_not_bring(error.kind(), weight.name(), error.what());
  }
  return found;
}

// The host has to know which rows. So it waits until the device has computed the indices. The time
// after that is the operator's wait for its rows, and counts as a stall.
at::Tensor look_up(c10::DispatchKeySet keys, const at::Tensor& table, const Weight& weight,
                   const Source& source, const at::Tensor& indices) {
  const at::Tensor numbers = indices.to(at::kCPU, at::kLong).contiguous();
  // A padded prompt asks for one row again and again. It is brought once.
  const auto [distinct, places, counts] = at::_unique2(numbers, /*sorted=*/true,
                                                       /*return_inverse=*/true);
  const std::span<const int64_t> rows(distinct.const_data_ptr<int64_t>(), distinct.numel());
  for (const int64_t row : rows) {
    TORCH_CHECK_INDEX(row >= 0 && row < table.size(0), "index ", row,
                      " is out of range of an embedding with ", table.size(0), " rows");
  }
  const uint64_t nbytes = rows.size() * source.stored_row(row_bytes_of(table));
  const HostSpan span("stalls", weight.name(), nbytes);
  const auto begin = std::chrono::steady_clock::now();
  const at::Tensor found = gathered(table, weight, source, rows).to(table.device());
  Counters& counters = weight.counters();
  counters.misses.fetch_add(1, std::memory_order_relaxed);
  counters.stall_ns.fetch_add(
      (std::chrono::steady_clock::now() - begin) / std::chrono::nanoseconds(1),
      std::memory_order_relaxed);
  counters.travelled(source.donor->tier(), nbytes);
  process_fetches.fetch_add(1, std::memory_order_relaxed);
  return at::_ops::embedding::redispatch(below_hook(keys), found, places.to(table.device()),
                                         /*padding_idx=*/-1, false, false);
}

at::Tensor embedding(c10::DispatchKeySet keys, const at::Tensor& table, const at::Tensor& indices,
                     c10::SymInt padding, bool scale_by_frequency, bool sparse) {
  return at_border([&] {
    if (is_sharded(table) && !is_sharded(indices)) {
      const Weight& weight = *handle_of(table).weight;
      const Source source = weight.source();
      if (takes_rows(table, weight, source, indices)) {
        weight.ring().refuse_recording(weight);
        return look_up(keys, table, weight, source, indices);
      }
    }
    Call call;
    return call.run([&] {
      return at::_ops::embedding::redispatch(
          below_hook(keys), call.read_only(table, Likeness::kBytes),
          call.read_only(indices, Likeness::kBytes), padding, scale_by_frequency, sparse);
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CustomRNGKeyId, library) {
  library.impl("embedding", TORCH_FN(embedding));
}

}  // namespace distorch
