// Memory that kernels may touch: what of it is alive, who touched what since the last barrier, and when.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace ptx {

// Barriers and beginnings of blocks are counted through all launches, so that old marks need no clearing.
using Time = uint32_t;

// When something was last done to a granule of memory, by which warp, and whether an earlier block of the same launch
// did it as well.
struct Deed {
  static constexpr int16_t kMany = -1;

  Time when = 0;
  int16_t warp = 0;
  bool elsewhere = false;
};

// A store of the value that is there already is no change: all warps may store one value in one place.
struct Mark {
  Deed read, written, changed;
  bool atomic = false;  // the last store was one
};

// What an access is judged by.
struct Moment {
  Time now = 0;
  Time block = 0;   // when the block began
  Time launch = 0;  // when the launch began
  int16_t warp = 0;
};

// Marks of one piece of memory.
class Marks {
 public:
  void cover(uint64_t bytes, int granule);
  // A conflict that the access makes, or null.
  const char* read(uint64_t offset, uint64_t bytes, const Moment& moment);
  const char* write(uint64_t offset, uint64_t bytes, bool changes, const Moment& moment, bool atomic = false);
  void forget() { marks_.clear(); }

 private:
  std::vector<Mark> marks_;
  int granule_ = 1;
};

struct Allocation {
  uint64_t begin = 0;
  uint64_t end = 0;
  Marks marks;
};

// Allocations that are alive: the only global memory there is.
class Registry {
 public:
  static Registry& one();

  void add(uint64_t begin, uint64_t bytes);
  void remove(uint64_t begin);
  // The one that an address is in, or null.
  Allocation* holding(uint64_t address);
  void forget_marks();

 private:
  std::map<uint64_t, Allocation> by_begin_;
};

}  // namespace ptx
