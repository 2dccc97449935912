// SPDX-License-Identifier: Apache-2.0
// To be preloaded: one call of one kind fails, if it comes from distorch's library.
//
// Which one is said by arm(). Threads are started by others on behalf of the library (Python,
// libstdc++), so for them every caller counts.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

enum Kind { kNone, kOpen, kRead, kShortRead, kEnd, kWrite, kShortWrite, kRoom, kMap, kNew, kThread };

std::atomic<uintptr_t> first{0}, last{0};
std::atomic<int> armed{kNone}, nth{0}, code{0}, seen{0};

bool strikes(Kind kind, void* caller) {
  if (armed.load() != kind) return false;
  const auto at = reinterpret_cast<uintptr_t>(caller);
  if (kind != kThread && (at < first.load() || at >= last.load())) return false;
  return ++seen == nth.load();
}

template <class Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
}

void* checked(void* memory) {
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

#define CALLER __builtin_return_address(0)

extern "C" {

// The code of the library lies in [begin, end).
void fault_range(uintptr_t begin, uintptr_t end) { first = begin, last = end; }

// The `which`-th call of that kind fails with `error`; 0: they are only counted.
void fault_arm(int kind, int which, int error) { armed = kNone, seen = 0, nth = which, code = error, armed = kind; }

// How many there were since; nothing fails any more.
int fault_disarm() {
  armed = kNone;
  return seen.load();
}

int open(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = va_arg(more, mode_t);
  va_end(more);
  if (strikes(kOpen, CALLER)) return errno = code, -1;
  static const auto next = real<int (*)(const char*, int, ...)>("open");
  return next(path, flags, mode);
}

ssize_t pread(int fd, void* into, size_t bytes, off_t offset) {
  static const auto next = real<ssize_t (*)(int, void*, size_t, off_t)>("pread");
  if (strikes(kRead, CALLER)) return errno = code, -1;
  if (strikes(kEnd, CALLER)) return 0;
  const ssize_t got = next(fd, into, bytes, offset);
  return got > 1 && strikes(kShortRead, CALLER) ? got / 2 : got;
}

ssize_t pwrite(int fd, const void* from, size_t bytes, off_t offset) {
  static const auto next = real<ssize_t (*)(int, const void*, size_t, off_t)>("pwrite");
  if (strikes(kWrite, CALLER)) return errno = code, -1;
  if (strikes(kShortWrite, CALLER)) return next(fd, from, (bytes + 1) / 2, offset);
  return next(fd, from, bytes, offset);
}

int posix_fallocate(int fd, off_t offset, off_t bytes) {
  static const auto next = real<int (*)(int, off_t, off_t)>("posix_fallocate");
  return strikes(kRoom, CALLER) ? code.load() : next(fd, offset, bytes);
}

void* mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) noexcept {
  static const auto next = real<void* (*)(void*, size_t, int, int, int, off_t)>("mmap");
  if (strikes(kMap, CALLER)) return errno = code, MAP_FAILED;
  return next(at, bytes, protection, flags, fd, offset);
}

void* aligned_alloc(size_t alignment, size_t bytes) noexcept {
  static const auto next = real<void* (*)(size_t, size_t)>("aligned_alloc");
  return strikes(kNew, CALLER) ? nullptr : next(alignment, bytes);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*),
                   void* argument) noexcept {
  static const auto next =
      real<int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*)>("pthread_create");
  return strikes(kThread, CALLER) ? code.load() : next(thread, attributes, body, argument);
}

}  // extern "C"

void* operator new(size_t bytes) {
  if (strikes(kNew, CALLER)) throw std::bad_alloc();
  return checked(std::malloc(bytes == 0 ? 1 : bytes));
}

void* operator new[](size_t bytes) {
  if (strikes(kNew, CALLER)) throw std::bad_alloc();
  return checked(std::malloc(bytes == 0 ? 1 : bytes));
}

void operator delete(void* at) noexcept { std::free(at); }
void operator delete[](void* at) noexcept { std::free(at); }
void operator delete(void* at, size_t) noexcept { std::free(at); }
void operator delete[](void* at, size_t) noexcept { std::free(at); }
