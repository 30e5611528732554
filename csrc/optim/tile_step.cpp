#include "optim/tile_step.h"

#include <utility>

namespace mlsys {

std::unique_ptr<TileStep> make_tile_step(std::string_view rule, const StepArguments& args) {
  using Make = std::unique_ptr<TileStep> (*)(const StepArguments&);
#define MLSYS_ENTRY(name) {#name, name##_tile_step},
  constexpr std::pair<std::string_view, Make> kRules[] = {MLSYS_ELEMENT_RULES(MLSYS_ENTRY)};
#undef MLSYS_ENTRY
  for (const auto& [name, make] : kRules) {
    if (name == rule) return make(args);
  }
  return nullptr;
}

}  // namespace mlsys
