// Where the steps of a factor are kept between the passes of an AdamW step.
#pragma once

#include "stiefel/passes.h"

namespace stella::STELLA_ISA {
namespace {

// Rows like the factor's, or chunk after chunk of rows with its columns side by side, `leading` apart.
struct StepsLayout {
  int64_t n, r, chunk, leading;
  bool by_rows;

  StepsLayout(const AdamwJob& job, int element_bytes, bool rows)
      : n(job.factor.n), r(job.factor.r), chunk(chunk_rows_for(2 * r, n, element_bytes)), by_rows(rows) {
    leading = column_stride(chunk, element_bytes);
  }

  int64_t size() const { return by_rows ? n * r : (n + chunk - 1) / chunk * r * leading; }
  int64_t chunk_at(int64_t i) const { return i / chunk * r * leading; }  // i is the first row of a chunk
  int64_t index(int64_t i, int64_t j) const { return by_rows ? i * r + j : chunk_at(i) + j * leading + i % chunk; }
};

}  // namespace
}  // namespace stella::STELLA_ISA
