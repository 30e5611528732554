#include "optim/tile_step.h"

#include <utility>

namespace mlsys {

std::unique_ptr<TileStep> make_tile_step(std::string_view rule, const StepArguments& args) {
  using Make = std::unique_ptr<TileStep> (*)(const StepArguments&);
  constexpr std::pair<std::string_view, Make> kRules[] = {{"adamw", adamw_tile_step}, {"sgd", sgd_tile_step}};
  for (const auto& [name, make] : kRules) {
    if (name == rule) return make(args);
  }
  return nullptr;
}

}  // namespace mlsys
