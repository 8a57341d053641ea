// Instructions that all lanes of a warp take part in: shuffles, reductions, matrix loads, matrix products.
#include <cmath>

#include "formats.h"
#include "table.h"

namespace ptx {
namespace {

void need_all(const Instruction& in, uint32_t lanes) {
  if (lanes != kAll) in.fault("an instruction of the whole warp, some lanes of which are elsewhere");
}

const Operand& part(const Operand& operand, int which) {
  return operand.kind == Operand::Kind::kList ? operand.list.at(static_cast<size_t>(which)) : operand;
}

// shfl.sync by its definition: `c` holds the clamp and the mask of segments.
template <char kMode>
void shuffle(const Instruction& in, Warp& warp, uint32_t lanes) {
  need_all(in, lanes);
  const uint32_t* a = warp.lanes<uint32_t>(in.operands[1]);
  const uint32_t* b = warp.lanes<uint32_t>(in.operands[2]);
  const uint32_t* c = warp.lanes<uint32_t>(in.operands[3]);
  if (warp.lanes<uint32_t>(in.operands[4])[0] != kAll) in.fault("a shuffle of some lanes alone");
  uint32_t taken[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int by = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(c[lane] & 31);
    const int segment = static_cast<int>(c[lane] >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = kMode == 'u' ? lane - by : kMode == 'd' ? lane + by : kMode == 'b' ? lane ^ by : first | (by & ~segment);
    const bool valid = kMode == 'u' ? from >= last : from <= last;
    if (!valid) from = lane;
    taken[lane] = a[from];
  }
  std::memcpy(warp.lanes<uint32_t>(in.operands[0]), taken, sizeof taken);
}

template <class T, T (*kJoin)(T, T)>
void reduce(const Instruction& in, Warp& warp, uint32_t lanes) {
  need_all(in, lanes);
  const T* a = warp.lanes<T>(in.operands[1]);
  T all = a[0];
  for (int lane = 1; lane < kLanes; ++lane) all = kJoin(all, a[lane]);
  T* d = warp.lanes<T>(in.operands[0]);
  for (int lane = 0; lane < kLanes; ++lane) d[lane] = all;
}

template <class T>
T sum(T a, T b) {
  return a + b;
}
template <class T>
T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T most(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T conjunction(T a, T b) {
  return a & b;
}
template <class T>
T disjunction(T a, T b) {
  return a | b;
}

// A matrix of 8 x 8 elements of 16 bits: lane l has two of row l / 4, or transposed of column l / 4. The address of
// row i of matrix k is lane 8 k + i's.
template <int kMatrices, bool kTransposed>
void load_matrices(const Instruction& in, Warp& warp, uint32_t lanes) {
  need_all(in, lanes);
  uint16_t rows[8 * kMatrices][8];
  for (int row = 0; row < 8 * kMatrices; ++row) {
    warp.block.read_shared(in, warp, warp.address(in.operands[1], row), 16, rows[row]);
  }
  for (int k = 0; k < kMatrices; ++k) {
    uint32_t* d = warp.lanes<uint32_t>(part(in.operands[0], k));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint16_t low = kTransposed ? rows[8 * k + j][i] : rows[8 * k + i][j];
      const uint16_t high = kTransposed ? rows[8 * k + j + 1][i] : rows[8 * k + i][j + 1];
      d[lane] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
}

template <int kMatrices, bool kTransposed>
void store_matrices(const Instruction& in, Warp& warp, uint32_t lanes) {
  need_all(in, lanes);
  uint16_t rows[8 * kMatrices][8];
  for (int k = 0; k < kMatrices; ++k) {
    const uint32_t* a = warp.lanes<uint32_t>(part(in.operands[1], k));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      (kTransposed ? rows[8 * k + j][i] : rows[8 * k + i][j]) = static_cast<uint16_t>(a[lane]);
      (kTransposed ? rows[8 * k + j + 1][i] : rows[8 * k + i][j + 1]) = static_cast<uint16_t>(a[lane] >> 16);
    }
  }
  for (int row = 0; row < 8 * kMatrices; ++row) {
    warp.block.write_shared(in, warp, warp.address(in.operands[0], row), 16, rows[row]);
  }
}

// The sum as the tensor core rounds it: how, PTX leaves open. To the nearest, or unkindly towards zero.
float rounded(double exact, bool truncate) {
  const float nearest = static_cast<float>(exact);
  if (!truncate || !std::isfinite(nearest) || std::fabs(nearest) <= std::fabs(exact)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

// The result's registers, which may be operands as well: written when all is computed.
template <class T, int N>
void give(const Instruction& in, Warp& warp, const T (&made)[N][kLanes]) {
  for (int which = 0; which < N; ++which) {
    std::memcpy(warp.lanes<T>(part(in.operands[0], which)), made[which], sizeof made[which]);
  }
}

// D = A B + C of 16 x K, K x 8 and 16 x 8 in float.
template <int K>
void multiply(const Instruction& in, Warp& warp, const float (&a)[16][K], const float (&b)[K][8]) {
  double total[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < K; ++k) {
      for (int j = 0; j < 8; ++j) total[i][j] += static_cast<double>(a[i][k]) * static_cast<double>(b[k][j]);
    }
  }
  ++warp.block.launch.counts.products;
  const bool truncate = warp.block.launch.unkind(kTruncate);
  float made[4][kLanes];
  for (int which = 0; which < 4; ++which) {
    const float* c = warp.lanes<float>(part(in.operands[3], which));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = lane / 4 + 8 * (which / 2), j = 2 * (lane % 4) + which % 2;
      made[which][lane] = rounded(total[i][j] + static_cast<double>(c[lane]), truncate);
    }
  }
  give(in, warp, made);
}

void multiply_tf32_k8(const Instruction& in, Warp& warp, uint32_t lanes) {
  need_all(in, lanes);
  float a[16][8], b[8][8];
  for (int which = 0; which < 4; ++which) {
    const uint32_t* from = warp.lanes<uint32_t>(part(in.operands[1], which));
    for (int lane = 0; lane < kLanes; ++lane) {
      a[lane / 4 + 8 * (which % 2)][lane % 4 + 4 * (which / 2)] = read_tf32(from[lane]);
    }
  }
  for (int which = 0; which < 2; ++which) {
    const uint32_t* from = warp.lanes<uint32_t>(part(in.operands[2], which));
    for (int lane = 0; lane < kLanes; ++lane) b[lane % 4 + 4 * which][lane / 4] = read_tf32(from[lane]);
  }
  multiply<8>(in, warp, a, b);
}

// Half precision, K = 8 or 16: registers hold two elements each, side by side in A's rows and in B's columns.
template <float (*kFormat)(uint16_t), int K>
void multiply_half(const Instruction& in, Warp& warp, uint32_t lanes) {
  need_all(in, lanes);
  float a[16][K], b[K][8];
  for (int which = 0; which < K / 4; ++which) {
    const uint32_t* from = warp.lanes<uint32_t>(part(in.operands[1], which));
    for (int lane = 0; lane < kLanes; ++lane) {
      float* at = &a[lane / 4 + 8 * (which % 2)][2 * (lane % 4) + 8 * (which / 2)];
      at[0] = kFormat(static_cast<uint16_t>(from[lane]));
      at[1] = kFormat(static_cast<uint16_t>(from[lane] >> 16));
    }
  }
  for (int which = 0; which < K / 8; ++which) {
    const uint32_t* from = warp.lanes<uint32_t>(part(in.operands[2], which));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int k = 2 * (lane % 4) + 8 * which;
      b[k][lane / 4] = kFormat(static_cast<uint16_t>(from[lane]));
      b[k + 1][lane / 4] = kFormat(static_cast<uint16_t>(from[lane] >> 16));
    }
  }
  multiply<K>(in, warp, a, b);
}

float half_by_table(uint16_t bits) {
  static const std::vector<float> values = [] {
    std::vector<float> made(1 << 16);
    for (uint32_t i = 0; i < made.size(); ++i) made[i] = from_half(static_cast<uint16_t>(i));
    return made;
  }();
  return values[bits];
}

// 8 x 4, 4 x 8 and 8 x 8 in double; each sum one fused step after another.
void multiply_double(const Instruction& in, Warp& warp, uint32_t lanes) {
  need_all(in, lanes);
  double a[8][4], b[4][8];
  const double* from_a = warp.lanes<double>(part(in.operands[1], 0));
  const double* from_b = warp.lanes<double>(part(in.operands[2], 0));
  for (int lane = 0; lane < kLanes; ++lane) {
    a[lane / 4][lane % 4] = from_a[lane];
    b[lane % 4][lane / 4] = from_b[lane];
  }
  ++warp.block.launch.counts.products;
  double made[2][kLanes];
  for (int which = 0; which < 2; ++which) {
    const double* c = warp.lanes<double>(part(in.operands[3], which));
    for (int lane = 0; lane < kLanes; ++lane) {
      double total = c[lane];
      for (int k = 0; k < 4; ++k) total = std::fma(a[lane / 4][k], b[k][2 * (lane % 4) + which], total);
      made[which][lane] = total;
    }
  }
  give(in, warp, made);
}

template <int kMatrices, bool kTransposed>
void add_matrices(Table& table) {
  const std::string name = ".sync.aligned.m8n8.x" + std::to_string(kMatrices) + (kTransposed ? ".trans" : "");
  table["ldmatrix" + name + ".shared.b16"] = {load_matrices<kMatrices, kTransposed>, {kAny, kAny}};
  table["stmatrix" + name + ".shared.b16"] = {store_matrices<kMatrices, kTransposed>, {kAny, kAny}};
}

template <char kMode>
void add_shuffle(Table& table, const std::string& mode) {
  table["shfl.sync." + mode + ".b32"] = {shuffle<kMode>, {4, 4, 4, 4, 4}};
}

}  // namespace

void add_warp_wide(Table& table) {
  add_shuffle<'u'>(table, "up");
  add_shuffle<'d'>(table, "down");
  add_shuffle<'b'>(table, "bfly");
  add_shuffle<'i'>(table, "idx");
  table["redux.sync.add.s32"] = {reduce<uint32_t, sum<uint32_t>>, {4, 4, 4}};
  table["redux.sync.add.u32"] = {reduce<uint32_t, sum<uint32_t>>, {4, 4, 4}};
  table["redux.sync.min.s32"] = {reduce<int32_t, least<int32_t>>, {4, 4, 4}};
  table["redux.sync.max.s32"] = {reduce<int32_t, most<int32_t>>, {4, 4, 4}};
  table["redux.sync.min.u32"] = {reduce<uint32_t, least<uint32_t>>, {4, 4, 4}};
  table["redux.sync.max.u32"] = {reduce<uint32_t, most<uint32_t>>, {4, 4, 4}};
  table["redux.sync.and.b32"] = {reduce<uint32_t, conjunction<uint32_t>>, {4, 4, 4}};
  table["redux.sync.or.b32"] = {reduce<uint32_t, disjunction<uint32_t>>, {4, 4, 4}};
  add_matrices<1, false>(table);
  add_matrices<2, false>(table);
  add_matrices<4, false>(table);
  add_matrices<1, true>(table);
  add_matrices<2, true>(table);
  add_matrices<4, true>(table);
  const std::vector<int> four = {kAny, kAny, kAny, kAny};
  table["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = {multiply_tf32_k8, four};
  table["mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32"] = {multiply_half<from_bfloat16, 8>, four};
  table["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = {multiply_half<from_bfloat16, 16>, four};
  table["mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"] = {multiply_half<half_by_table, 8>, four};
  table["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = {multiply_half<half_by_table, 16>, four};
  table["mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64"] = {multiply_double, four};
}

}  // namespace ptx
