#include "comm/fault/inquest.h"

#include <vector>

namespace mlsys::comm {
namespace {

using State = Standing::State;

std::string last_call(const Standing& standing) {
  const OpKind kind = standing.last.kind;
  return kind == OpKind::kNone || kind == OpKind::kConnecting ? "last called nothing"
                                                              : "last called " + describe(standing.last);
}

}  // namespace

Verdict judge(const Topology& topology, std::span<const Standing> standings, std::span<const int> awaited,
              const Descriptor& op) {
  std::vector<int> stopped, behind, silent;
  std::string parts[4];
  const char* titles[] = {" Stopped:", " Not arrived:", " No answer:", " Arrived:"};
  for (size_t index = 0; index < standings.size(); ++index) {
    const auto rank = static_cast<int>(index);
    const Standing& standing = standings[index];
    const std::string name = " rank " + std::to_string(topology.global(rank));
    const bool arrived = standing.last.kind != OpKind::kNone && standing.last.sequence >= op.sequence;
    size_t part = 3;
    if (standing.state == State::kStopped) {
      part = 0;
      stopped.push_back(rank);
    } else if (standing.state == State::kSilent) {
      part = 2;
      silent.push_back(rank);
    } else if (!arrived) {
      part = 1;
      behind.push_back(rank);
    }
    parts[part] += name + (part == 2 ? ";" : " " + last_call(standing) + ";");
  }
  Verdict verdict;
  for (const std::vector<int>& suspects : {stopped, behind, silent, {awaited.begin(), awaited.end()}}) {
    if (verdict.culprit < 0 && !suspects.empty()) verdict.culprit = suspects.front();
  }
  verdict.unreachable = !stopped.empty() || (behind.empty() && !silent.empty());
  for (size_t part = 0; part < 4; ++part) {
    if (parts[part].empty()) continue;
    parts[part].back() = '.';
    verdict.findings += titles[part] + parts[part];
  }
  return verdict;
}

}  // namespace mlsys::comm
