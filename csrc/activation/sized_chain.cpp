#include "activation/sized_chain.h"

#include <algorithm>
#include <numeric>

namespace mlsys::activation {
namespace {

double seconds(const OptionCosts& option) { return option.forward_s + option.backward_s; }

// Whether `one` can stand in for `other` wherever it is used. Of two equal options the first stays.
bool makes_useless(const OptionCosts& one, const OptionCosts& other, bool comes_first) {
  const bool at_least_as_good = seconds(one) <= seconds(other) && one.saved_bytes <= other.saved_bytes &&
                                one.forward_peak_bytes <= other.forward_peak_bytes &&
                                one.backward_peak_bytes <= other.backward_peak_bytes;
  const bool equal = seconds(one) == seconds(other) && one.saved_bytes == other.saved_bytes &&
                     one.forward_peak_bytes == other.forward_peak_bytes &&
                     one.backward_peak_bytes == other.backward_peak_bytes;
  return at_least_as_good && (comes_first || !equal);
}

// Judged on bytes, so that an option nobody needs changes neither the unit nor any rounding.
std::vector<int32_t> useful_options(const std::vector<OptionCosts>& options) {
  std::vector<int32_t> useful;
  for (size_t i = 0; i < options.size(); ++i) {
    bool useless = false;
    for (size_t k = 0; k < options.size(); ++k) {
      useless |= k != i && makes_useless(options[k], options[i], k < i);
    }
    if (!useless) useful.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(useful.begin(), useful.end(), [&](int32_t left, int32_t right) {
    return options[static_cast<size_t>(left)].saved_bytes < options[static_cast<size_t>(right)].saved_bytes;
  });
  return useful;
}

}  // namespace

SizedChain in_units(const Chain& chain, int64_t unit) {
  const auto units = [unit](int64_t bytes) { return bytes / unit + (bytes % unit != 0 ? 1 : 0); };
  SizedChain sized{unit, {}};
  for (size_t i = 0; i < chain.size(); ++i) {
    const BlockCosts& costs = chain[i];
    SizedBlock block{i == 0 ? 0 : units(costs.input_bytes),
                     i == 0 ? 0 : units(chain[i - 1].output_gradient_bytes),
                     units(costs.drop_peak_bytes),
                     costs.drop_forward_s,
                     costs.splittable,
                     0,
                     {}};
    const std::vector<int32_t> useful = useful_options(costs.options);
    double fastest = seconds(costs.options[static_cast<size_t>(useful.front())]);
    for (const int32_t index : useful) {
      fastest = std::min(fastest, seconds(costs.options[static_cast<size_t>(index)]));
    }
    for (const int32_t index : useful) {
      const OptionCosts& option = costs.options[static_cast<size_t>(index)];
      block.options.push_back({units(option.saved_bytes), units(option.forward_peak_bytes),
                               units(option.backward_peak_bytes), seconds(option) - fastest, index});
    }
    sized.blocks.push_back(std::move(block));
  }
  int border = sized.length();
  for (int i = sized.length() - 1; i >= 0; --i) {
    SizedBlock& block = sized.blocks[static_cast<size_t>(i)];
    block.next_border = border;
    if (!block.splittable) border = i;
  }
  return sized;
}

int64_t common_unit(const SizedChain& in_bytes) {
  int64_t unit = 0;
  for (const SizedBlock& block : in_bytes.blocks) {
    for (const int64_t size : {block.input, block.end_gradient, block.drop_peak}) unit = std::gcd(unit, size);
    for (const SizedOption& option : block.options) {
      for (const int64_t size : {option.saved, option.forward_peak, option.backward_peak}) {
        unit = std::gcd(unit, size);
      }
    }
  }
  return unit;
}

}  // namespace mlsys::activation
