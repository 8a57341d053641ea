// Blocks one after another, in random order; of a block its warps, in random order and for random lengths.
#include "block.h"

#include <algorithm>

namespace ptx {
namespace {

Time g_time = 0;

template <class T>
void shuffle(std::vector<T>& items, Chance& chance) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[chance.below(static_cast<uint32_t>(i))]);
}

std::string place(const Instruction& instruction, const char* what, uint64_t address, uint32_t bytes) {
  char text[100];
  std::snprintf(text, sizeof text, "%s, %u bytes at 0x%llx", what, bytes, static_cast<unsigned long long>(address));
  return std::string(text) + ": " + instruction.text;
}

void set_special(const Launch& launch, const Warp& warp, Shape at) {
  const std::map<std::string, uint32_t> same = {{"%tid.y", 0},
                                                {"%tid.z", 0},
                                                {"%ntid.x", launch.threads},
                                                {"%ntid.y", 1},
                                                {"%ntid.z", 1},
                                                {"%ctaid.x", at.x},
                                                {"%ctaid.y", at.y},
                                                {"%ctaid.z", at.z},
                                                {"%nctaid.x", launch.grid.x},
                                                {"%nctaid.y", launch.grid.y},
                                                {"%nctaid.z", launch.grid.z}};
  for (const auto& special : launch.program.special) {
    uint32_t* lanes = reinterpret_cast<uint32_t*>(warp.file + special.second);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (special.first == "%tid.x") {
        lanes[lane] = static_cast<uint32_t>(warp.number * kLanes + lane);
      } else if (special.first == "%laneid") {
        lanes[lane] = static_cast<uint32_t>(lane);
      } else {
        lanes[lane] = same.at(special.first);
      }
    }
  }
}

// Instructions of a warp, the lowest first where its lanes have parted, until it waits, ends or has used its budget.
void advance(Warp& warp, uint32_t budget) {
  Launch& launch = warp.block.launch;
  const Instruction* code = launch.program.code.data();
  while (budget > 0 && !warp.groups.empty() && !warp.waiting) {
    size_t lowest = 0;
    int next = INT32_MAX;  // where another group waits to be joined
    for (size_t i = 1; i < warp.groups.size(); ++i) {
      if (warp.groups[i].at < warp.groups[lowest].at) lowest = i;
    }
    for (size_t i = 0; i < warp.groups.size(); ++i) {
      if (i != lowest) next = std::min(next, warp.groups[i].at);
    }
    if (next == warp.groups[lowest].at) {
      for (size_t i = warp.groups.size(); i-- > 0;) {
        if (i == lowest || warp.groups[i].at != next) continue;
        warp.groups[lowest].lanes |= warp.groups[i].lanes;
        warp.groups.erase(warp.groups.begin() + static_cast<long>(i));
        if (i < lowest) --lowest;
      }
      continue;
    }
    int at = warp.groups[lowest].at;
    const uint32_t active = warp.groups[lowest].lanes;
    for (bool same = true; same && budget > 0 && at < next; --budget) {
      const Instruction& instruction = code[at];
      uint32_t lanes = active;
      if (instruction.guarded) {
        const uint32_t guard = warp.predicate(instruction.guard);
        lanes &= instruction.guard_negated ? ~guard : guard;
      }
      ++launch.counts.instructions;
      ++at;
      switch (instruction.flow) {
        case Instruction::Flow::kNext:
          if (lanes) instruction.run(instruction, warp, lanes);
          break;
        case Instruction::Flow::kBranch:
          if (lanes == active) {
            at = instruction.target;
            same = at < next;
          } else if (lanes) {
            warp.groups[lowest].lanes = active & ~lanes;
            warp.groups.push_back({instruction.target, lanes});
            same = false;
          }
          break;
        case Instruction::Flow::kExit:
          warp.groups[lowest].lanes = active & ~lanes;
          same = false;
          break;
        case Instruction::Flow::kBarrier:
          if (instruction.barrier == launch.removed_barrier) break;
          if (lanes != warp.alive() || lanes != kAll)
            instruction.fault("a barrier that not every lane of a warp is at");
          warp.waiting = true;
          same = false;
          break;
      }
    }
    warp.groups[lowest].at = at;
    if (!warp.groups[lowest].lanes) warp.groups.erase(warp.groups.begin() + static_cast<long>(lowest));
  }
}

void run_block(Launch& launch, Shape at, std::vector<uint8_t>& files) {
  const Program& program = launch.program;
  const uint32_t count = launch.threads / kLanes;
  Block block{launch, std::vector<uint8_t>(launch.shared_bytes, 0xff), {}, ++g_time, 0};
  block.began = block.now;
  block.marks.cover(launch.shared_bytes, program.shared_granule);
  std::fill(files.begin(), files.end(), 0xff);  // NaN in every format, and no address
  std::vector<Warp> warps;
  std::vector<uint32_t> order;
  for (uint32_t i = 0; i < count; ++i) {
    uint8_t* file = files.data() + static_cast<size_t>(i) * program.file_bytes;
    warps.push_back({block, static_cast<int16_t>(i), file, program.constants.data(), {{0, kAll}}});
    set_special(launch, warps.back(), at);
    order.push_back(i);
  }
  while (true) {
    shuffle(order, launch.chance);
    uint32_t ended = 0, waiting = 0;
    for (uint32_t i : order) {
      Warp& warp = warps[i];
      // long runs, and ends in the middle
      if (!warp.waiting) advance(warp, launch.chance() & 1 ? UINT32_MAX : launch.chance.below(200) + 1);
      ended += warp.groups.empty();
      waiting += warp.waiting;
    }
    if (ended == count) break;
    if (ended + waiting < count) continue;
    if (ended) throw Fault("warps wait at a barrier that others have ended without");
    for (Warp& warp : warps) warp.waiting = false;
    block.now = ++g_time;
    ++launch.counts.barriers;
  }
}

}  // namespace

Moment Block::moment(const Warp& warp) const { return {now, began, launch.began, warp.number}; }

Allocation& Block::allocation(const Instruction& instruction, uint64_t address, uint32_t bytes) {
  if (address % bytes) throw Fault(place(instruction, "global memory, misaligned", address, bytes));
  Allocation*& recent = launch.recent[instruction.index];
  if (!recent || address < recent->begin || address >= recent->end) {
    recent = Registry::one().holding(address);
    if (recent && launch.unkind(kRaces))
      recent->marks.cover(recent->end - recent->begin, launch.program.global_granule);
  }
  if (!recent || address + bytes > recent->end) {
    throw Fault(place(instruction, "global memory, out of bounds", address, bytes));
  }
  return *recent;
}

void Block::read_global(const Instruction& instruction, const Warp& warp, uint64_t address, uint32_t bytes,
                        void* into) {
  Allocation& whole = allocation(instruction, address, bytes);
  launch.counts.bytes_read += bytes;
  std::memcpy(into, reinterpret_cast<const void*>(address), bytes);
  if (!launch.unkind(kRaces)) return;
  if (const char* conflict = whole.marks.read(address - whole.begin, bytes, moment(warp))) {
    launch.race(instruction, conflict);
  }
}

void Block::write_global(const Instruction& instruction, const Warp& warp, uint64_t address, uint32_t bytes,
                         const void* from) {
  Allocation& whole = allocation(instruction, address, bytes);
  launch.counts.bytes_written += bytes;
  void* at = reinterpret_cast<void*>(address);
  const bool changes = std::memcmp(at, from, bytes) != 0;
  std::memcpy(at, from, bytes);
  if (!launch.unkind(kRaces)) return;
  if (const char* conflict = whole.marks.write(address - whole.begin, bytes, changes, moment(warp))) {
    launch.race(instruction, conflict);
  }
}

uint32_t Block::update_global(const Instruction& instruction, const Warp& warp, uint64_t address,
                              uint32_t (*change)(uint32_t, uint32_t), uint32_t with) {
  Allocation& whole = allocation(instruction, address, 4);
  launch.counts.bytes_written += 4;
  uint32_t before;
  std::memcpy(&before, reinterpret_cast<const void*>(address), 4);
  const uint32_t after = change(before, with);
  std::memcpy(reinterpret_cast<void*>(address), &after, 4);
  if (launch.unkind(kRaces)) {
    const char* conflict = whole.marks.write(address - whole.begin, 4, after != before, moment(warp), true);
    if (conflict) launch.race(instruction, conflict);
  }
  return before;
}

void Block::read_shared(const Instruction& instruction, const Warp& warp, uint64_t address, uint32_t bytes,
                        void* into) {
  if (address % bytes) throw Fault(place(instruction, "shared memory, misaligned", address, bytes));
  if (address + bytes > shared.size()) throw Fault(place(instruction, "shared memory, out of bounds", address, bytes));
  std::memcpy(into, shared.data() + address, bytes);
  if (!launch.unkind(kRaces)) return;
  if (const char* conflict = marks.read(address, bytes, moment(warp))) launch.race(instruction, conflict);
}

void Block::write_shared(const Instruction& instruction, const Warp& warp, uint64_t address, uint32_t bytes,
                         const void* from) {
  if (address % bytes) throw Fault(place(instruction, "shared memory, misaligned", address, bytes));
  if (address + bytes > shared.size()) throw Fault(place(instruction, "shared memory, out of bounds", address, bytes));
  uint8_t* at = shared.data() + address;
  const bool changes = std::memcmp(at, from, bytes) != 0;
  std::memcpy(at, from, bytes);
  if (!launch.unkind(kRaces)) return;
  if (const char* conflict = marks.write(address, bytes, changes, moment(warp))) launch.race(instruction, conflict);
}

void run(Launch& launch) {
  if (launch.threads == 0 || launch.threads % kLanes) throw Fault("blocks of warps that are not whole");
  if (g_time > UINT32_MAX / 2) {  // long before it starts anew
    Registry::one().forget_marks();
    g_time = 0;
  }
  launch.began = g_time + 1;
  launch.recent.assign(launch.program.code.size(), nullptr);
  const uint64_t count = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = i;
  shuffle(order, launch.chance);
  std::vector<uint8_t> files(static_cast<size_t>(launch.threads / kLanes) * launch.program.file_bytes);
  std::string stopped;
  for (size_t place = 0; place < order.size() && stopped.empty(); ++place) {
    const uint64_t i = order[place];
    const Shape at{static_cast<uint32_t>(i % launch.grid.x), static_cast<uint32_t>(i / launch.grid.x % launch.grid.y),
                   static_cast<uint32_t>(i / launch.grid.x / launch.grid.y)};
    try {
      run_block(launch, at, files);
    } catch (const Fault& fault) {
      stopped = fault.what();  // perhaps for a race before it
    }
  }
  if (launch.races.empty() && !stopped.empty()) throw Fault(stopped);
  if (launch.races.empty()) return;
  std::string all = stopped.empty() ? "races:" : stopped + "; races:";
  for (const auto& race : launch.races) all += "\n  " + std::to_string(race.second) + " x " + race.first;
  throw Fault(all);
}

}  // namespace ptx
