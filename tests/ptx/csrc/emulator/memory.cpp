#include "memory.h"

#include <algorithm>
#include <mutex>

namespace ptx {

void Marks::cover(uint64_t bytes, int granule) {
  const uint64_t count = (bytes + granule - 1) / granule;
  if (granule != granule_) marks_.clear();
  granule_ = granule;
  if (marks_.size() < count) marks_.resize(count);
}

namespace {

enum class Past { kNone, kOtherWarp, kOtherBlock };

// What a deed is to someone at a moment: no matter, or not ordered with what is done now.
Past past(const Deed& deed, const Moment& moment) {
  if (deed.when < moment.launch) return Past::kNone;
  if (deed.when < moment.block || deed.elsewhere) return Past::kOtherBlock;
  return deed.when == moment.now && deed.warp != moment.warp ? Past::kOtherWarp : Past::kNone;
}

void note(Deed& deed, const Moment& moment) {
  deed.elsewhere = deed.when >= moment.launch && (deed.elsewhere || deed.when < moment.block);
  deed.warp = deed.when == moment.now && deed.warp != moment.warp ? Deed::kMany : moment.warp;
  deed.when = moment.now;
}

}  // namespace

const char* Marks::read(uint64_t offset, uint64_t bytes, const Moment& moment) {
  Past worst = Past::kNone;
  for (uint64_t i = offset / granule_; i <= (offset + bytes - 1) / granule_; ++i) {
    Mark& mark = marks_[i];
    worst = std::max(worst, past(mark.changed, moment));
    note(mark.read, moment);
  }
  return worst == Past::kNone        ? nullptr
         : worst == Past::kOtherWarp ? "read after another warp's write, with no barrier between"
                                     : "read of what another block of the launch wrote";
}

const char* Marks::write(uint64_t offset, uint64_t bytes, bool changes, const Moment& moment, bool atomic) {
  Past over = Past::kNone, after = Past::kNone;
  for (uint64_t i = offset / granule_; i <= (offset + bytes - 1) / granule_; ++i) {
    Mark& mark = marks_[i];
    if (changes) {
      if (!atomic || !mark.atomic) over = std::max(over, past(mark.written, moment));
      after = std::max(after, past(mark.read, moment));
      note(mark.changed, moment);
    }
    mark.atomic = atomic;
    note(mark.written, moment);
  }
  if (over == Past::kOtherBlock) return "write over what another block of the launch wrote";
  if (over == Past::kOtherWarp) return "write over another warp's write, with no barrier between";
  if (after == Past::kOtherBlock) return "write over what another block of the launch read";
  return after == Past::kOtherWarp ? "write after another warp's read, with no barrier between" : nullptr;
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
