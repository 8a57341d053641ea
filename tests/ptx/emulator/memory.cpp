#include "memory.h"

#include <mutex>

namespace ptx {

void Marks::cover(uint64_t bytes, int granule) {
  const uint64_t count = (bytes + granule - 1) / granule;
  if (granule != granule_) marks_.clear();
  granule_ = granule;
  if (marks_.size() < count) marks_.resize(count);
}

const char* Marks::read(uint64_t offset, uint64_t bytes, const Moment& moment) {
  const char* conflict = nullptr;
  for (uint64_t i = offset / granule_; i <= (offset + bytes - 1) / granule_; ++i) {
    Mark& mark = marks_[i];
    if (mark.written >= moment.launch) {
      if (mark.written < moment.block) {
        conflict = "read of what another block of the launch wrote";
      } else if (mark.written == moment.now && mark.writer != moment.warp) {
        conflict = "read after another warp's write, with no barrier between";
      }
    }
    if (mark.read >= moment.launch && mark.read < moment.block) {
      mark.read_elsewhere = true;
    } else if (mark.read < moment.launch) {
      mark.read_elsewhere = false;
    }
    mark.reader = mark.read == moment.now && mark.reader != moment.warp ? Mark::kMany : moment.warp;
    mark.read = moment.now;
  }
  return conflict;
}

const char* Marks::write(uint64_t offset, uint64_t bytes, bool changes, const Moment& moment, bool atomic) {
  if (!changes) return nullptr;
  const char* conflict = nullptr;
  for (uint64_t i = offset / granule_; i <= (offset + bytes - 1) / granule_; ++i) {
    Mark& mark = marks_[i];
    const bool both_atomic = atomic && mark.atomic;
    if (mark.written >= moment.launch && !both_atomic) {
      if (mark.written < moment.block) {
        conflict = "write over what another block of the launch wrote";
      } else if (mark.written == moment.now && mark.writer != moment.warp) {
        conflict = "write over another warp's write, with no barrier between";
      }
    }
    if (mark.read >= moment.launch) {
      if (mark.read < moment.block || mark.read_elsewhere) {
        conflict = "write over what another block of the launch read";
      } else if (mark.read == moment.now && mark.reader != moment.warp) {
        conflict = "write after another warp's read, with no barrier between";
      }
    }
    mark.writer = moment.warp;
    mark.written = moment.now;
    mark.atomic = atomic;
  }
  return conflict;
}

Registry& Registry::one() {
  static Registry* const registry = new Registry;  // tensors are freed after static objects are destroyed
  return *registry;
}

namespace {
std::mutex& lock() {
  static std::mutex* const mutex = new std::mutex;
  return *mutex;
}
}  // namespace

void Registry::add(uint64_t begin, uint64_t bytes) {
  const std::lock_guard<std::mutex> guard(lock());
  Allocation& allocation = by_begin_[begin];
  allocation.begin = begin;
  allocation.end = begin + bytes;
}

void Registry::remove(uint64_t begin) {
  const std::lock_guard<std::mutex> guard(lock());
  by_begin_.erase(begin);
}

Allocation* Registry::holding(uint64_t address) {
  const std::lock_guard<std::mutex> guard(lock());
  auto after = by_begin_.upper_bound(address);
  if (after == by_begin_.begin()) return nullptr;
  Allocation& allocation = std::prev(after)->second;
  return address < allocation.end ? &allocation : nullptr;
}

void Registry::forget_marks() {
  const std::lock_guard<std::mutex> guard(lock());
  for (auto& entry : by_begin_) entry.second.marks.forget();
}

}  // namespace ptx
