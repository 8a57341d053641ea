// The Riemannian AdamW step of contiguous float32 rows of 4. A vector holds whole rows, and what a row multiplies in
// itself, in its step or in a (4 x 4) matrix are products of vectors whose lanes were exchanged within the rows. Rows
// of 8 would have more sums than AVX2 has registers: 3.3 ns an element where rows.h takes 2.6.
#pragma once

#include <array>

#include "common/upcoming.h"
#include "stiefel/adamw/moments.h"
#include "stiefel/short_rows.h"

namespace stella::STELLA_ISA {
namespace {

// Sums of products, lane by lane: of so many terms in float32, then in float64.
template <int count>
class LaneSums {
 public:
  using V = Vector<float>;

  // Of kFloatSumTerms terms at most.
  STELLA_INLINE void add(const V* sums) {
    for (int k = 0; k < count; ++k) parts_[k] += sums[k];
    if (++blocks_ % 8 == 0) widen_parts();
  }

  // body(k, lane, sum) for all.
  template <typename Body>
  void each(Body&& body) {
    widen_parts();
    for (int k = 0; k < count; ++k)
      for (int lane = 0; lane < kWidest; ++lane) body(k, lane, totals_[k][lane]);
  }

 private:
  using Wide = typename VectorOf<double, kWidest>::type;

  void widen_parts() {
    for (int k = 0; k < count; ++k) {
      totals_[k] += __builtin_convertvector(parts_[k], Wide);
      parts_[k] = V{};
    }
  }

  V parts_[count] = {};
  Wide totals_[count] = {};
  int64_t blocks_ = 0;
};

// A (4 x 4) matrix, for rows times it: factor k meets a row whose lanes were exchanged by k.
struct ExchangedMatrix {
  static constexpr int r = 4;
  Vector<float> factors[r];

  explicit ExchangedMatrix(const double* matrix) {
    for (int k = 0; k < r; ++k)
      for (int lane = 0; lane < kWidest; ++lane) {
        const int to = lane % r;
        factors[k][lane] = static_cast<float>(matrix[(to ^ k) * r + to]);
      }
  }
};

template <typename V, int... by>
STELLA_INLINE void exchange_all(V v, V* exchanged, std::integer_sequence<int, by...>) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidest>();
  ((exchanged[by] = exchange<by>(v, lanes)), ...);
}

class ShortRowPasses {
 public:
  using Value = float;

  ShortRowPasses(const AdamwJob& job, int64_t begin, int64_t end) : job_(job), begin_(begin), end_(end) {}

  bool steps_in_panels() const { return false; }
  void keep_steps(float*) const {}

  // Y^T gradient, added to `coupling` (r x r).
  void coupling(double* coupling) const {
    LaneSums<r> total;
    for (int64_t i = begin_; i < end_; i += kBlock) {
      V sums[r] = {};
      over_vectors<2, 2>(i, {rows_of(job_.factor, i), rows_of(job_.gradient, i)}, [&](auto at) {
        V exchanged[r];
        exchange_all(load<V>(at[0]), exchanged, kAll);
        const V gradient = load<V>(at[1]);
#pragma GCC unroll 8
        for (int k = 0; k < r; ++k) sums[k] += exchanged[k] * gradient;
      });
      total.add(sums);
    }
    total.each([&](int k, int lane, double sum) { coupling[(lane % r ^ k) * r + lane % r] += sum; });
  }

  // Riemannian gradient and moments; the steps go to `steps`, rows like the factor's, and the Gram of [Y, step] is
  // added to `gram` (2r x 2r). `negative` holds -(gradient^T Y), r x r.
  void step(const double* negative, float* steps, double* gram) const {
    const Moments<float> moments(job_);
    const ExchangedMatrix matrix(negative);
    LaneSums<r> total_yy, total_yd;
    LaneSums<kRotations> total_dd;
    // From the last block to the first: the cache still holds the end of what the pass before read.
    for (int64_t i = begin_ + (end_ - begin_ - 1) / kBlock * kBlock; i >= begin_; i -= kBlock) {
      V yy[r] = {}, yd[r] = {}, dd[kRotations] = {};
      float *first = rows_of(job_.first_moment, i), *second = rows_of(job_.second_moment, i);
      if (i > begin_) {
        prefetch_rows(first - kBlock * r, kBlock * r);
        prefetch_rows(second - kBlock * r, kBlock * r);
      }
      const auto advance = [&](auto at) {
        V exchanged[r], values = load<V>(at[1]);
        exchange_all(load<V>(at[0]), exchanged, kAll);
#pragma GCC unroll 8
        for (int k = 0; k < r; ++k) values += exchanged[k] * matrix.factors[k];
        store(at[4], moments.advance(values, at[2], at[3]));
      };
      const auto sum = [&](auto at) {
        V exchanged[r];
        exchange_all(load<V>(at[0]), exchanged, kAll);
        const V step = load<V>(at[4]);
#pragma GCC unroll 8
        for (int k = 0; k < r; ++k) {
          yy[k] += exchanged[0] * exchanged[k];
          yd[k] += exchanged[k] * step;
        }
        add_rotations<r>(step, dd, std::make_integer_sequence<int, kRotations>());
      };
      const std::array<float*, 5> from = {rows_of(job_.factor, i), rows_of(job_.gradient, i), first, second,
                                          steps + i * r};
      over_vectors<5, 2>(i, from, advance);
      over_vectors<5, 5>(i, from, sum);
      total_yy.add(yy);
      total_yd.add(yd);
      total_dd.add(dd);
    }
    constexpr int order = 2 * r;
    total_yy.each([&](int k, int lane, double sum) {  // each product of two columns is there twice
      const int j = lane % r;
      if (j <= (j ^ k)) gram[j * order + (j ^ k)] += sum;
    });
    total_yd.each([&](int k, int lane, double sum) { gram[(lane % r ^ k) * order + r + lane % r] += sum; });
    total_dd.each([&](int by, int lane, double sum) {
      const int j = lane % r, k = (j + by) % r;
      if (2 * by == r && j >= k) return;  // so is each of these
      gram[(r + (j < k ? j : k)) * order + r + (j < k ? k : j)] += sum;
    });
  }

  // Y <- Y + Y (B R - I) + step R; `coefficients` (2r x r) holds B R - I and R.
  void update(const float* steps, const double* coefficients) const {
    const ExchangedMatrix of_factor(coefficients), of_step(coefficients + r * r);
    Upcoming upcoming(job_);
    for (int64_t i = begin_; i < end_; i += kBlock) {
      upcoming.fetch(kBlock * r * static_cast<int64_t>(sizeof(float)));
      over_vectors<2, 1>(i, {const_cast<float*>(steps) + i * r, rows_of(job_.factor, i)}, [&](auto at) {
        V exchanged[r], values = load<V>(at[1]);
        exchange_all(values, exchanged, kAll);
#pragma GCC unroll 8
        for (int k = 0; k < r; ++k) values += exchanged[k] * of_factor.factors[k];
        exchange_all(load<V>(at[0]), exchanged, kAll);
#pragma GCC unroll 8
        for (int k = 0; k < r; ++k) values += exchanged[k] * of_step.factors[k];
        store(at[1], values);
      });
    }
  }

 private:
  using V = Vector<float>;
  static constexpr int r = 4, kRotations = r / 2 + 1;
  static constexpr int64_t kPerVector = kWidest / r, kBlock = kFloatSumTerms * kPerVector;
  static constexpr auto kAll = std::make_integer_sequence<int, r>();

  // body(pointers) for the vectors of the block that starts at row i, in memory `from`. Rows that fill no vector go
  // through one of their own, with zeros behind them; those from number `written` on are put back.
  template <int count, int written, typename Body>
  STELLA_INLINE void over_vectors(int64_t i, const std::array<float*, count>& from, Body&& body) const {
    const int64_t rows = end_ - i < kBlock ? end_ - i : kBlock, whole = rows / kPerVector * kPerVector;
    std::array<float*, count> at = from;
    for (int64_t k = 0; k < whole; k += kPerVector) {
      body(at);
#pragma GCC unroll 5
      for (int s = 0; s < count; ++s) at[s] += kWidest;
    }
    if (whole == rows) return;
    const size_t bytes = static_cast<size_t>((rows - whole) * r) * sizeof(float);
    float last[count][kWidest] = {};
    std::array<float*, count> own;
    for (int s = 0; s < count; ++s) {
      std::memcpy(last[s], at[s], bytes);
      own[s] = last[s];
    }
    body(own);
    for (int s = written; s < count; ++s) std::memcpy(at[s], last[s], bytes);
  }

  const AdamwJob& job_;
  int64_t begin_, end_;
};

}  // namespace
}  // namespace stella::STELLA_ISA
