#include "activation/schedule_writer.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace mlsys::activation {
namespace {

// Work that is left: the part [begin, end), or the backward of block `begin` under an option.
struct Pending {
  int begin, end;
  int64_t memory;               // units that the part may use
  int64_t held;                 // true bytes that are held meanwhile, besides the part's input
  const SizedOption* backward;  // null: a part
};

class Writer {
 public:
  Writer(const Chain& chain, const SizedChain& sized, const Choose& choose)
      : chain_(chain), sized_(sized), choose_(choose) {}

  Schedule run(int64_t memory) {
    stack_.push_back({0, sized_.length(), memory, 0, nullptr});
    while (!stack_.empty()) {
      const Pending next = stack_.back();
      stack_.pop_back();
      if (next.backward != nullptr) {
        const OptionCosts& costs = option_of(next.begin, *next.backward);
        add({Action::kBackward, next.begin, -1}, costs.backward_s, next.held + costs.backward_peak_bytes);
      } else if (next.begin < next.end) {
        begin(next);
      }
    }
    return std::move(schedule_);
  }

 private:
  void begin(const Pending& part) {
    const Choice choice = choose_(part.begin, part.end, part.memory);
    if (choice.option != nullptr) {
      run_option(part, *choice.option);
    } else {
      drop(part, choice.middle);
    }
  }

  void run_option(const Pending& part, const SizedOption& option) {
    const int i = part.begin;
    const OptionCosts& costs = option_of(i, option);
    add({Action::kOption, i, option.index}, costs.forward_s,
        part.held + costs.forward_peak_bytes + gradient_bytes(part.end));
    const bool stored_apart = i + 1 < part.end && !block(i + 1).splittable;
    const int64_t held = part.held + costs.saved_bytes + (stored_apart ? block(i + 1).input_bytes : 0);
    stack_.push_back({i, i, 0, part.held, &option});
    stack_.push_back({i + 1, part.end, part.memory - sized_.held(i, option, part.end), held, nullptr});
  }

  void drop(const Pending& part, int middle) {
    for (int l = part.begin; l < middle; ++l) {
      const bool first = l == part.begin;
      add({first ? Action::kCheckpoint : Action::kDrop, l, -1}, block(l).drop_forward_s,
          part.held + (first ? 0 : block(l).input_bytes) + block(l).drop_peak_bytes +
              gradient_bytes(part.end));
    }
    const int64_t memory = part.memory - sized_.blocks[static_cast<size_t>(middle)].input;
    stack_.push_back({part.begin, middle, part.memory, part.held, nullptr});
    stack_.push_back({middle, part.end, memory, part.held + block(middle).input_bytes, nullptr});
  }

  void add(const Step& step, double seconds, int64_t bytes) {
    schedule_.steps.push_back(step);
    schedule_.seconds += seconds;
    schedule_.peak_bytes = std::max(schedule_.peak_bytes, bytes);
  }

  const BlockCosts& block(int i) const { return chain_[static_cast<size_t>(i)]; }
  const OptionCosts& option_of(int i, const SizedOption& option) const {
    return block(i).options[static_cast<size_t>(option.index)];
  }
  int64_t gradient_bytes(int end) const {
    return end < sized_.length() ? block(end - 1).output_gradient_bytes : 0;
  }

  const Chain& chain_;
  const SizedChain& sized_;
  const Choose& choose_;
  std::vector<Pending> stack_;
  Schedule schedule_;
};

// Calls visit(choice, least, time before the parts, the parts) for every choice that a part has. `least` is
// what the choice's own steps need.
struct Rest {
  int begin, end;
  int64_t held;  // units that are held while this part runs
};
template <class Visit>
void for_each_choice(const SizedChain& chain, int i, int j, const Visit& visit) {
  for (const SizedOption& option : chain.blocks[static_cast<size_t>(i)].options) {
    const int64_t least = std::max(option.forward_peak + chain.gradient(j), option.backward_peak);
    if (visit(Choice{&option, 0}, least, option.extra_s, Rest{i + 1, j, chain.held(i, option, j)},
              Rest{i, i, 0})) {
      return;
    }
  }
  int64_t peak = 0;
  double drop_s = 0;
  const int last = chain.last_middle(i, j);
  for (int k = i + 1; k <= last; ++k) {
    const SizedBlock& dropped = chain.blocks[static_cast<size_t>(k) - 1];
    peak = std::max(peak, dropped.drop_peak + (k - 1 > i ? dropped.input : 0));
    drop_s += dropped.drop_s;
    const int64_t held = chain.blocks[static_cast<size_t>(k)].input;
    if (visit(Choice{nullptr, k}, peak + chain.gradient(j), drop_s, Rest{k, j, held}, Rest{i, k, 0})) return;
  }
}

}  // namespace

Choose choose_by_table(const SizedChain& chain, const Table& table) {
  return [&](int i, int j, int64_t m) {
    const float wanted = table.at(i, j, m);
    Choice found;
    bool is_found = false;
    for_each_choice(
        chain, i, j,
        [&](const Choice& choice, int64_t least, double time, const Rest& back, const Rest& front) {
          if (m < least) return false;
          // The same sum in the same order as in the table, so that equality is exact.
          const float parts =
              table.at(front.begin, front.end, m) + table.at(back.begin, back.end, m - back.held);
          is_found = parts + static_cast<float>(time) == wanted;
          if (is_found) found = choice;
          return is_found;
        });
    if (!is_found || wanted == std::numeric_limits<float>::infinity()) {
      throw std::logic_error("activation::choose_by_table: nothing gives the value of [" + std::to_string(i) +
                             ", " + std::to_string(j) + ") with " + std::to_string(m) + " units");
    }
    return found;
  };
}

Choose choose_by_bytes(const SizedChain& in_bytes, const MemoryBounds& in_bytes_bounds,
                       const SizedChain& chain, const MemoryBounds& bounds, const Table& table) {
  // What the table says of that many bytes, or of the least memory that it knows to be enough.
  const auto estimate = [&](int i, int j, int64_t bytes) {
    return i == j ? 0 : table.at(i, j, std::max(bytes / chain.unit, bounds.least(i, j)));
  };
  return [&, estimate](int i, int j, int64_t m) {
    Choice found;
    float best = std::numeric_limits<float>::infinity();
    for_each_choice(
        in_bytes, i, j,
        [&](const Choice& choice, int64_t least, double time, const Rest& back, const Rest& front) {
          if (m < least || m < in_bytes_bounds.least(front.begin, front.end) ||
              m - back.held < in_bytes_bounds.least(back.begin, back.end)) {
            return false;
          }
          const float value = estimate(front.begin, front.end, m) +
                              estimate(back.begin, back.end, m - back.held) + static_cast<float>(time);
          if (value < best) {
            best = value;
            found = choice;
          }
          return false;
        });
    if (best == std::numeric_limits<float>::infinity()) {
      throw std::logic_error("activation::choose_by_bytes: nothing fits [" + std::to_string(i) + ", " +
                             std::to_string(j) + ") into " + std::to_string(m) + " bytes");
    }
    return found;
  };
}

Choose choose_fastest(const SizedChain& in_bytes, const MemoryBounds& in_bytes_bounds) {
  return [&](int i, int j, int64_t m) {
    for (const SizedOption& option : in_bytes.blocks[static_cast<size_t>(i)].options) {
      const int64_t peak = std::max(option.forward_peak + in_bytes.gradient(j), option.backward_peak);
      const int64_t rest = in_bytes.held(i, option, j) + in_bytes_bounds.enough(i + 1, j);
      if (option.extra_s == 0 && m >= std::max(peak, rest)) return Choice{&option, 0};
    }
    throw std::logic_error("activation::choose_fastest: no fastest option of block " + std::to_string(i) +
                           " fits into " + std::to_string(m) + " bytes");
  };
}

Schedule write_schedule(const Chain& chain, const SizedChain& sized, int64_t memory, const Choose& choose) {
  return Writer(chain, sized, choose).run(memory);
}

}  // namespace mlsys::activation
