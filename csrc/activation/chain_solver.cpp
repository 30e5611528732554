#include "activation/chain_solver.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "activation/intervals.h"
#include "activation/schedule_writer.h"
#include "activation/sized_chain.h"
#include "activation/table.h"

namespace mlsys::activation {
namespace {

constexpr int64_t kMostValues = int64_t{1} << 28;  // of the table: 1 GiB

// As many as cost about two seconds at 400 different blocks, and a tenth of one at 96. More than 16000 change
// only budgets within a hundredth of the least.
int64_t default_slots(int64_t num_problems, int64_t length) {
  return std::clamp<int64_t>(256'000'000'000 / (num_problems * length), 1000, 16000);
}

class Solver {
 public:
  Solver(const Chain& chain, int64_t num_slots)
      : chain_(chain),
        bytes_(in_units(chain, 1)),
        sharing_(find_equal_intervals(bytes_)),
        byte_bounds_(memory_bounds(bytes_, sharing_)),
        units_(bytes_),
        bounds_(byte_bounds_),
        num_slots_(num_slots > 0
                       ? num_slots
                       : default_slots(static_cast<int64_t>(sharing_.examples.size()), bytes_.length())) {}

  int64_t least_bytes() const { return byte_bounds_.least(0, bytes_.length()); }
  int64_t enough_bytes() const { return byte_bounds_.enough(0, bytes_.length()); }
  const Sharing& sharing() const { return sharing_; }
  int64_t unit() const { return units_.unit; }

  // The largest common unit that leaves no more than num_slots sizes is exact. Otherwise the unit is coarser
  // than the sizes, and coarser again until the whole table fits into memory, whatever the budgets are.
  void choose_unit() {
    const int64_t common = std::max<int64_t>(common_unit(bytes_), 1);
    is_exact_ = enough_bytes() / common <= num_slots_;
    int64_t unit = is_exact_ ? common : (enough_bytes() + num_slots_ - 1) / num_slots_;
    while (true) {
      units_ = in_units(chain_, unit);
      bounds_ = memory_bounds(units_, sharing_);
      const int64_t num_values = Table::num_values(sharing_, bounds_, enough_in_units());
      if (num_values <= kMostValues) return;
      is_exact_ = false;
      unit +=
          1 + static_cast<int64_t>(static_cast<double>(unit) *
                                   (static_cast<double>(num_values) / static_cast<double>(kMostValues) - 1));
    }
  }

  void fill_table(int64_t largest_budget) {
    const int64_t smallest = std::max(bounds_.least(0, bytes_.length()), least_bytes() / units_.unit);
    cap_ = std::min(enough_in_units(), std::max(largest_budget / units_.unit, smallest) + look_ahead());
    table_.emplace(units_, sharing_, bounds_, cap_, simd_level());
    smallest_ = write_schedule(chain_, bytes_, least_bytes(),
                               choose_by_bytes(bytes_, byte_bounds_, units_, bounds_, *table_));
  }

  Schedule fastest() const {
    return write_schedule(chain_, bytes_, enough_bytes(), choose_fastest(bytes_, byte_bounds_));
  }

  // The schedules to choose from are those behind the table's values, whatever the budget, and the one for
  // the least memory. Rounding makes a schedule look larger than it is by up to a unit for everything that is
  // held at its peak. So the look-up begins some units above the budget, and goes down to the first schedule
  // whose true peak fits. More budget only adds candidates: the result is monotone.
  Schedule best_within(int64_t budget) {
    const int length = bytes_.length();
    Schedule best = smallest_;
    float limit = std::numeric_limits<float>::infinity();
    for (int64_t m = std::min(budget / units_.unit + look_ahead(), cap_); m >= bounds_.least(0, length);
         --m) {
      const float extra = table_->at(0, length, m);
      if (extra > limit) break;
      if (m > 0 && table_->at(0, length, m - 1) == extra) continue;  // the same schedules need less
      const Schedule& candidate = schedule_at(m);
      if (candidate.peak_bytes > budget) continue;
      // Times of the table are rounded: lower values than this cannot be better in truth.
      limit = std::min(limit, extra * (1 + static_cast<float>(2 * length + 2) * 0x1p-22F));
      if (candidate.seconds < best.seconds ||
          (candidate.seconds == best.seconds && candidate.peak_bytes < best.peak_bytes)) {
        best = candidate;
      }
    }
    return best;
  }

 private:
  int64_t enough_in_units() const { return bounds_.enough(0, bytes_.length()); }
  // More than the things that can be held at once: an input and an option a block, a step and a gradient.
  int64_t look_ahead() const { return is_exact_ ? 0 : 2 * bytes_.length() + 3; }

  const Schedule& schedule_at(int64_t m) {
    const auto found = schedules_.find(m);
    if (found != schedules_.end()) return found->second;
    return schedules_.emplace(m, write_schedule(chain_, units_, m, choose_by_table(units_, *table_)))
        .first->second;
  }

  const Chain& chain_;
  SizedChain bytes_;
  Sharing sharing_;
  MemoryBounds byte_bounds_;
  SizedChain units_;
  MemoryBounds bounds_;
  int64_t num_slots_;
  bool is_exact_ = false;
  int64_t cap_ = 0;
  std::optional<Table> table_;
  Schedule smallest_;
  std::map<int64_t, Schedule> schedules_;
};

void check(const Chain& chain, const std::vector<int64_t>& budgets) {
  const auto refuse = [](const std::string& what) {
    throw std::invalid_argument("activation::solve: " + what);
  };
  if (chain.empty()) refuse("the chain has no block");
  for (size_t i = 0; i < chain.size(); ++i) {
    const BlockCosts& block = chain[i];
    const std::string where = "block " + std::to_string(i);
    if (block.options.empty()) refuse(where + " has no option");
    int64_t least = std::min({block.input_bytes, block.drop_peak_bytes, block.output_gradient_bytes});
    double least_s = block.drop_forward_s;
    bool finite = std::isfinite(block.drop_forward_s);
    for (const OptionCosts& option : block.options) {
      least = std::min({least, option.saved_bytes, option.forward_peak_bytes, option.backward_peak_bytes});
      least_s = std::min({least_s, option.forward_s, option.backward_s});
      finite = finite && std::isfinite(option.forward_s) && std::isfinite(option.backward_s);
    }
    if (least < 0 || least_s < 0 || !finite)
      refuse(where + " has a size or a time that is negative or not finite");
  }
  for (const int64_t budget : budgets) {
    if (budget < 0) refuse("the budget is " + std::to_string(budget) + " bytes");
  }
}

}  // namespace

Solution solve(const Chain& chain, const std::vector<int64_t>& budgets, int64_t num_slots) {
  check(chain, budgets);
  Solver solver(chain, num_slots);
  Solution solution;
  solution.least_bytes = solver.least_bytes();
  solution.enough_bytes = solver.enough_bytes();
  solution.num_problems = static_cast<int64_t>(solver.sharing().examples.size());
  solution.schedules.resize(budgets.size());
  int64_t largest = -1;  // of the budgets between the bounds, where there is something to choose
  for (const int64_t budget : budgets) {
    if (budget < solution.enough_bytes) largest = std::max(largest, budget);
  }
  if (largest >= solution.least_bytes) {
    solver.choose_unit();
    solver.fill_table(largest);
    solution.unit_bytes = solver.unit();
    solution.num_slots = solution.enough_bytes / solver.unit();
  }
  for (size_t n = 0; n < budgets.size(); ++n) {
    if (budgets[n] < solution.least_bytes) continue;
    solution.schedules[n] =
        budgets[n] >= solution.enough_bytes ? solver.fastest() : solver.best_within(budgets[n]);
  }
  return solution;
}

}  // namespace mlsys::activation
