// Which rank and operation a message speaks of. Made at every call, put into words only when one fails.
#pragma once

#include <string>

#include "bindings/comm/membership.h"

namespace mlsys::binding {

struct Where {
  const Membership* membership;
  const char* operation;

  // "rank 1, all_reduce of group 0".
  std::string words() const {
    return "rank " + std::to_string(membership->global_rank()) + ", " + operation + " of group " +
           membership->options().group_name;
  }
};

template <class Text>
std::string operator+(const Where& where, const Text& text) {
  return where.words() + text;
}

}  // namespace mlsys::binding
