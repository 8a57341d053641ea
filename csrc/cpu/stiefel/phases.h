// The phases of a step on some rows of each factor: what couples rows is summed by the caller, over processes.
#pragma once

#include <vector>

#include "stiefel/schedule.h"

namespace stella {

// Of one factor's rows, or of all rows once they are added up. `full` is r x r by rows, `upper` the upper triangle of a
// symmetric one by rows.
struct Blocks {
  std::vector<double> full, upper;
};

// gradient^T Y and Y^T Y of each.
std::vector<Blocks> gradient_blocks(const Pool& pool, const std::vector<GradientJob>& jobs);

// ||gradient||_F of each, at most 1e30; NaN where a value is not finite.
std::vector<double> gradient_norms(const Pool& pool, const std::vector<GradientJob>& jobs);

// gradient <- gradient - Y (gradient^T Y), by the blocks of all rows; the factor is copied to its snapshot first.
void subtract_blocks(const Pool& pool, const std::vector<GradientJob>& jobs, const std::vector<Blocks>& all);

// Y^T Delta and Delta^T Delta of each.
std::vector<Blocks> step_blocks(const Pool& pool, const std::vector<RetractJob>& jobs);

// The update of these rows from the blocks of all. Outcomes depend on the blocks alone.
std::vector<Outcome> retract_rows(const Pool& pool, const std::vector<RetractJob>& jobs,
                                  const std::vector<Blocks>& points, const std::vector<Blocks>& steps);

// The moments are advanced; steps are kept in `kept`, adamw_kept_bytes of each, and their blocks returned.
int64_t adamw_kept_bytes(const AdamwJob& job);
std::vector<Blocks> adamw_blocks(const Pool& pool, const std::vector<AdamwJob>& jobs, const std::vector<Blocks>& points,
                                 const std::vector<char*>& kept);

// Of the jobs only the factors count.
std::vector<Outcome> adamw_rows(const Pool& pool, const std::vector<MatrixView>& factors,
                                const std::vector<Blocks>& points, const std::vector<Blocks>& steps,
                                const std::vector<char*>& kept);

}  // namespace stella
