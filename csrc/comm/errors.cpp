#include "comm/communicator.h"

namespace mlsys::comm {
namespace {

std::string sentence(int rank, const std::string& host, int64_t pid, const std::string& cause,
                     const std::string& op, uint64_t sequence) {
  std::string text = rank < 0 ? "an unknown rank" : "rank " + std::to_string(rank);
  if (!host.empty()) text += " (host " + host + ", pid " + std::to_string(pid) + ")";
  text += " failed: " + cause;
  if (!op.empty()) text += "; operation " + op + " number " + std::to_string(sequence);
  return text;
}

}  // namespace

PeerFailed::PeerFailed(int rank, std::string host, int64_t pid, std::string cause, std::string op,
                       uint64_t sequence)
    : std::runtime_error(sentence(rank, host, pid, cause, op, sequence)),
      rank(rank),
      host(std::move(host)),
      pid(pid),
      cause(std::move(cause)),
      op(std::move(op)),
      sequence(sequence) {}

}  // namespace mlsys::comm
