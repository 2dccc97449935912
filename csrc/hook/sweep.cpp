// SPDX-License-Identifier: Apache-2.0
#include "hook/sweep.h"

#include <ATen/core/enum_tag.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <memory>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "core/mutex.h"
#include "hook/fallback.h"
#include "hook/sharded.h"
#include "hook/sparse.h"

namespace distorch {
namespace {

using c10::DispatchKey;

enum class Treatment {
  kLeave,        // the fallback, or a decomposition into operators that are hooked
  kFallthrough,  // works on the sharded tensor itself
  kBoxed,        // the hook, in front of a composite kernel
};

// Operators that read shapes, not bytes, though their schemas do not say so.
const std::unordered_set<std::string_view>& shape_only_operators() {
  static const auto& names =
      *new std::unordered_set<std::string_view>{"aten::empty_like",
                                                "aten::zeros_like",
                                                "aten::ones_like",
                                                "aten::full_like",
                                                "aten::rand_like",
                                                "aten::randn_like",
                                                "aten::randint_like",
                                                "aten::new_empty",
                                                "aten::new_zeros",
                                                "aten::new_ones",
                                                "aten::new_full",
                                                "aten::new_empty_strided",
                                                "aten::is_same_size",
                                                "aten::sym_size",
                                                "aten::sym_stride",
                                                "aten::sym_numel",
                                                "aten::size",
                                                "aten::stride",
                                                "aten::numel",
                                                "aten::dim",
                                                "aten::is_contiguous",
                                                "aten::sym_storage_offset",
                                                "aten::storage_offset",
                                                "aten::sym_is_contiguous",
                                                "aten::is_non_overlapping_and_dense",
                                                "aten::dense_dim",
                                                "aten::sparse_dim",
                                                "aten::_has_same_storage_numel",
                                                "prim::device",
                                                "prim::dtype",
                                                "prim::layout"};
  return names;
}

bool returns_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
  }
  return false;
}

bool takes_tensors(const c10::FunctionSchema& schema) {
  for (const c10::Argument& argument : schema.arguments()) {
    const std::string type = argument.type()->str();
    if (type.find("Tensor") != std::string::npos) return true;
  }
  return false;
}

Treatment classify(const c10::OperatorHandle& op) {
  if (!op.hasSchema() || !takes_tensors(op.schema())) return Treatment::kLeave;
  if (op.hasKernelForDispatchKey(kHookKey)) return Treatment::kLeave;
  const bool own_kernel =
      op.hasKernelForDispatchKey(DispatchKey::CPU) || op.hasKernelForDispatchKey(DispatchKey::CUDA);
  const bool implicit = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
  // Its decomposition sits at the hook's key already. (A fallthrough in its
  // place breaks `to`: BackendSelect redispatches without skipping those.)
  if (implicit && !own_kernel) return Treatment::kLeave;
  const c10::OperatorName& name = op.operator_name();
  if (shape_only_operators().count(name.name) > 0 &&
      name.overload_name.find("out") == std::string::npos) {
    return Treatment::kFallthrough;
  }
  if (returns_view(op.schema()) || op.hasTag(at::Tag::inplace_view)) return Treatment::kFallthrough;
  if (op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
      op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional)) {
    return Treatment::kBoxed;
  }
  return implicit ? Treatment::kBoxed : Treatment::kLeave;
}

c10::KernelFunction kernel_for(Treatment treatment) {
  if (treatment == Treatment::kFallthrough) return c10::KernelFunction::makeFallthrough();
  return c10::KernelFunction::makeFromBoxedFunction<&run_with_real_weights>();
}

class Silence : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

// Counts registrations of operators, from whatever library.
class Listener : public c10::OpRegistrationListener {
 public:
  explicit Listener(std::atomic<uint64_t>& count) : count_(count) {}
  void onOperatorRegistered(const c10::OperatorHandle&) override { ++count_; }
  void onOperatorDeregistered(const c10::OperatorHandle&) override {}

 private:
  std::atomic<uint64_t>& count_;
};

// Lives as long as the process: so do the registrations.
class Sweeper {
 public:
  Sweeper()
      : listening_(c10::Dispatcher::singleton().addRegistrationListener(
            std::make_unique<Listener>(registered_))) {}

  size_t sweep() {
    if (swept_.load(std::memory_order_acquire) == registered_.load(std::memory_order_acquire)) {
      return 0;
    }
    const MutexLock lock(mutex_);
    const uint64_t seen = registered_;
    const size_t before = registrations_.size();
    for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
      if (const auto op = c10::Dispatcher::singleton().findOp(name)) attend(*op);
    }
    swept_.store(seen, std::memory_order_release);
    return registrations_.size() - before;
  }

 private:
  void attend(const c10::OperatorHandle& op) REQUIRES(mutex_) {
    if (op.hasSchema() && attended_.insert(op.operator_name()).second) attend_sparse(op);
    const Treatment treatment = classify(op);
    if (treatment != Treatment::kLeave) put(op, kHookKey, kernel_for(treatment));
  }

  // Once for each operator: the kernels that are put in front call those that they find.
  void attend_sparse(const c10::OperatorHandle& op) REQUIRES(mutex_) {
    for (const DispatchKey key : keys_of_constructor(op)) {
      put(op, key, before_constructor(op, key));
    }
    if (!may_meet_weights(op.schema()) || !keys_of_constructor(op).empty()) return;
    for (const DispatchKey key : kSparseKeys) {
      if (op.hasKernelForDispatchKey(key)) put(op, key, before_sparse_kernel(op, key));
    }
  }

  void put(const c10::OperatorHandle& op, DispatchKey key, c10::KernelFunction kernel)
      REQUIRES(mutex_) {
    // PyTorch warns where a kernel takes another one's place. Ours goes on to the other one.
    Silence silence;
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);
    registrations_.push_back(c10::Dispatcher::singleton().registerImpl(
        op.operator_name(), key, std::move(kernel), std::nullopt, nullptr,
        "distorch: sharded weights"));
  }

  Mutex mutex_;
  std::unordered_set<c10::OperatorName> attended_ GUARDED_BY(mutex_);
  std::atomic<uint64_t> registered_{0};
  std::atomic<uint64_t> swept_{0};
  std::vector<c10::RegistrationHandleRAII> registrations_ GUARDED_BY(mutex_);
  c10::RegistrationHandleRAII listening_;
};

}  // namespace

size_t sweep_operators() {
  static Sweeper& sweeper = *new Sweeper;
  return sweeper.sweep();
}

}  // namespace distorch
